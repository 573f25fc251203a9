"""Owns the blocks that the engine opens for the io process: every opening has an id of its own and is ended once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from engine.page_protocol import LoadPages, PagesLoaded, PagesOpened
from pdserve.errors import WorkerLost
from service_kit.logs import get_logger
from worker_runtime.engine_link import EngineLink

log = get_logger(__name__)


class PageOpenings:
    def __init__(self, engine: EngineLink) -> None:
        self._engine = engine
        self._waiting: dict[int, asyncio.Future[PagesOpened]] = {}
        self._next_id = 1

    async def open(self, command: Callable[[int], LoadPages], deadline_s: float) -> PagesOpened | None:
        """None: the engine did not answer in time. Otherwise `end` must follow, whatever was opened."""
        load_id, self._next_id = self._next_id, self._next_id + 1
        waiter: asyncio.Future[PagesOpened] = asyncio.get_running_loop().create_future()
        self._waiting[load_id] = waiter
        self._engine.send(command(load_id))
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline_s - time.monotonic()):
                return await waiter
        except TimeoutError:
            # Both may happen in one turn of the loop. An answer that comes later gives its blocks back in `opened`.
            return waiter.result() if waiter.done() and not waiter.cancelled() else None

    def opened(self, event: PagesOpened) -> None:
        waiter = self._waiting.pop(event.load_id, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(event)
        else:
            self.end(event.load_id, 0)

    def end(self, load_id: int, good: int) -> None:
        """Nobody touches the blocks any more; the first `good` of those that were opened hold verified pages. Without effect once the
        engine is gone: the node ends then."""
        try:
            self._engine.send(PagesLoaded(load_id, good))
        except WorkerLost as lost:
            log.debug("engine_gone", message=lost.message)
