"""Owns how OpenVINO GenAI is started as a contender: `benchmarks/openvino_child.py` in an environment of its own."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.engine_driver import Dtype
from benchmarks.peer_process import PeerProgram, Setting, inherited_environment


def openvino_program(python: Path, model_dir: Path, dtype: Dtype, cores: tuple[int, ...]) -> PeerProgram:
    """Its threads are TBB's: it binds them itself, to the cores that the process may use."""
    environment = {**inherited_environment(os.environ), "HF_HUB_OFFLINE": "1"}
    load: dict[str, Setting] = {
        "model_dir": str(model_dir),
        "work_dir": str(model_dir / f"openvino-{dtype}"),
        "dtype": dtype,
        "threads": len(cores),
    }
    return PeerProgram("OpenVINO GenAI", python, "benchmarks.openvino_child", environment, cores, load)
