"""Owns the entry point of the engine process: the native engine behind the link. Started by the io process alone."""

from __future__ import annotations

import sys

from engine.native import NativeEngine

from engine.protocol import EventSink
from service_kit.config import ClusterConfig
from worker_runtime.engine_process import host_engine


def open_native(config: ClusterConfig, sink: EventSink) -> NativeEngine:
    return NativeEngine.open(config.model, config.engine, sink)


if __name__ == "__main__":
    sys.exit(host_engine(int(sys.argv[1]), int(sys.argv[2]), open_native))
