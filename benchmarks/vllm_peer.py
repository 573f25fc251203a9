"""Owns how vLLM is started as a contender: `benchmarks/vllm_child.py` in an environment of its own.

The engine, its scheduler and its one worker are that one process, with as many threads as ours on the same cores. This spares
vLLM the messages between its processes, so it is measured at its best.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peer_process import ANSWER_S, PEERS, PeerProgram, Setting, inherited_environment

CACHE = PEERS / "vllm" / ".venv" / "cache"
KV_GIB = 2


@dataclass(frozen=True, slots=True)
class VllmOptions:
    dtype: str
    cores: tuple[int, ...]  # one thread on each
    max_tokens: int
    max_sequences: int
    eager: bool
    answer_s: float = ANSWER_S


def vllm_program(python: Path, model_dir: Path, options: VllmOptions) -> PeerProgram:
    load: dict[str, Setting] = {
        "model_dir": str(model_dir),
        "dtype": options.dtype,
        "max_tokens": options.max_tokens,
        "max_sequences": options.max_sequences,
        "eager": options.eager,
    }
    environment = child_environment(python, options.cores, os.environ)
    return PeerProgram(
        "vLLM", python, "benchmarks.vllm_child", environment, options.cores, load, answer_s=options.answer_s
    )


def child_environment(python: Path, cores: Sequence[int], inherited: Mapping[str, str]) -> dict[str, str]:
    """What vLLM's own launcher sets for a worker: OpenMP of Intel where it is installed, one thread bound to each core."""
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    preload = {"LD_PRELOAD": str(openmp)} if openmp.is_file() else {}
    bound = ",".join(map(str, cores))
    return {
        **inherited_environment(inherited),
        **preload,
        "OMP_NUM_THREADS": str(len(cores)),
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{bound}]",
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
        "VLLM_CPU_OMP_THREADS_BIND": bound,
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(CACHE / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
        "HF_HUB_OFFLINE": "1",
    }
