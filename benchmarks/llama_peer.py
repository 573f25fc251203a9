"""Owns how llama.cpp is started as a contender: `benchmarks/llama_child.py` in an environment of its own, over a GGUF file."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.engine_driver import Dtype
from benchmarks.gguf_model import write_gguf
from benchmarks.peer_process import PeerProgram, Setting, inherited_environment


def llama_program(python: Path, model_dir: Path, dtype: Dtype, cores: tuple[int, ...], max_tokens: int) -> PeerProgram:
    """Writes the GGUF file into `model_dir`. Its threads are OpenMP's, bound as ours."""
    gguf = write_gguf(model_dir, model_dir / f"{dtype}.gguf", dtype)
    environment = {
        **inherited_environment(os.environ),
        "GOMP_CPU_AFFINITY": " ".join(map(str, cores)),
        "OMP_NUM_THREADS": str(len(cores)),
    }
    load: dict[str, Setting] = {
        "model_path": str(gguf),
        "dtype": dtype,
        "threads": len(cores),
        "max_tokens": max_tokens,
    }
    return PeerProgram("llama.cpp (llama-cpp-python)", python, "benchmarks.llama_child", environment, cores, load)
