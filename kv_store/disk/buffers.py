"""Owns the aligned memory that records pass through: allocated once, handed out one at a time."""

from __future__ import annotations

import mmap
import queue
from collections.abc import Iterator
from contextlib import contextmanager

from kv_store.disk.layout import BLOCK_BYTES


class Buffers:
    """`count` buffers of `size_bytes` (a multiple of 4096), aligned to 4096. Whoever finds none waits for one."""

    def __init__(self, count: int, size_bytes: int) -> None:
        assert size_bytes % BLOCK_BYTES == 0
        self._memory = mmap.mmap(-1, count * size_bytes)
        view = memoryview(self._memory)
        self._free: queue.LifoQueue[memoryview] = queue.LifoQueue()
        for start in range(0, count * size_bytes, size_bytes):
            self._free.put(view[start : start + size_bytes])

    @contextmanager
    def taken(self) -> Iterator[memoryview]:
        buffer = self._free.get()
        try:
            yield buffer
        finally:
            self._free.put(buffer)
