"""Owns the start of a native engine in a process of its own, linked as in a worker."""

from __future__ import annotations

import sys
from pathlib import Path

from service_kit.config import ClusterConfig, EngineConfig, LogConfig, ModelConfig
from worker_runtime.engine_link import EngineLink, ProcessEngineLink


async def open_native_link(model_dir: Path, *, threads: int, kv_bytes: int) -> EngineLink:
    """fp32 on the CPU, default chunks, nothing reused between prompts."""
    config = ClusterConfig(
        model=ModelConfig(path=str(model_dir), device="cpu", dtype="float32"),
        engine=EngineConfig(threads=threads, kv_bytes=kv_bytes, prefix_reuse=False),
        log=LogConfig(level="warning"),
    )
    command = (sys.executable, "-m", "worker.engine_main")
    return await ProcessEngineLink.start(config.model_dump_json().encode(), config.worker.engine_start_s, command)
