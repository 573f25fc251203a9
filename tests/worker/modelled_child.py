"""Owns an engine process for tests that hosts the modelled engine. Environment STEP_MS: duration of every step."""

from __future__ import annotations

import os
import sys

from engine.protocol import EventSink
from service_kit.config import ClusterConfig
from simulator.cost_model import CostModel
from simulator.modelled_engine import ModelledConfig, ModelledEngine
from worker_runtime.engine_process import host_engine


def open_modelled(config: ClusterConfig, sink: EventSink) -> ModelledEngine:
    step_s = float(os.environ.get("STEP_MS", "1")) / 1000
    cost = CostModel(step_s, 0.0, step_s, 0.0, 0.0)
    return ModelledEngine(ModelledConfig(cost=cost), sink)


if __name__ == "__main__":
    sys.exit(host_engine(int(sys.argv[1]), int(sys.argv[2]), open_modelled))
