"""Owns reads of the tiers into the arena, in threads: those for this worker's prompts, or those for its peers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kv_store.page import PageId
from kv_store.split import Run
from kv_store.tiered_store import LoadReport, TieredStore
from worker_runtime.engine_link import EngineLink

ArenaPages: TypeAlias = npt.NDArray[np.uint8]  # [layer, block, byte]


def arena_pages(engine: EngineLink) -> ArenaPages:
    layout = engine.ready.layout
    flat: ArenaPages = np.frombuffer(engine.arena.whole(), dtype=np.uint8)
    return flat.reshape(layout.layers, layout.blocks, layout.block_bytes)


class TierReads:
    def __init__(self, store: TieredStore, arena: ArenaPages, threads: int, name: str) -> None:
        self._store = store
        self._arena = arena
        self._threads = ThreadPoolExecutor(threads, name)

    def locate(self, ids: Sequence[PageId]) -> asyncio.Future[list[Run]]:
        return asyncio.get_running_loop().run_in_executor(self._threads, self._store.locate, ids)

    def load(self, ids: Sequence[PageId], blocks: Sequence[int], deadline_s: float) -> asyncio.Future[LoadReport]:
        """A read in progress goes on past the deadline: `blocks` may be written to until the future is done."""
        into = [self._arena[:, block] for block in blocks]
        return asyncio.get_running_loop().run_in_executor(self._threads, self._store.load, ids, into, deadline_s)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
