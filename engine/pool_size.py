"""Owns the size of a KV pool that is asked for by free memory, and what a process takes of it."""

from __future__ import annotations

from pathlib import Path

import torch

from service_kit.config import EngineConfig

CPU_POOL_BYTES = 256 * 2**20  # every page of it is touched at start
_PAGE_BYTES = 4096


def pool_bytes(engine: EngineConfig, device: torch.device) -> int:
    """`engine.kv_bytes`, or what free memory allows beyond the reserve. After the weights were loaded."""
    if engine.kv_bytes:
        return engine.kv_bytes
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, free - int(engine.memory_reserve * total))
    memory = _meminfo()
    free_bytes = memory["MemAvailable"] - int(engine.memory_reserve * memory["MemTotal"])
    return max(0, min(CPU_POOL_BYTES, free_bytes))


def resident_bytes() -> int:
    """Of this process in RAM, the KV arena included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


def _meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3}
