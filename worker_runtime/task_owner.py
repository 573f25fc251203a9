"""Owns the tasks that work on single dispatches: a failure of one is logged and answered, and ends neither node nor others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from pdserve.errors import InternalError, PdserveError
from service_kit.logs import get_logger

log = get_logger(__name__)


class TaskOwner:
    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[None, None, None], failed: Callable[[PdserveError], None]) -> asyncio.Task[None]:
        """Runs `work`; what it raises goes to `failed`, bugs as InternalError."""
        task = asyncio.create_task(_guarded(work, failed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _guarded(work: Coroutine[None, None, None], failed: Callable[[PdserveError], None]) -> None:
    try:
        await work
    except PdserveError as error:
        failed(error)
    except Exception as error:
        log.exception("dispatch_task_failed", error)
        failed(InternalError("The worker failed on this dispatch; its log has the cause."))
