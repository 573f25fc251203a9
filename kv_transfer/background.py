"""Owns background tasks: each has an owner, and an unexpected failure is logged, not lost."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from service_kit.logs import get_logger

_log = get_logger(__name__)


class BackgroundTasks:
    """Tasks of one owner. `close` ends them all."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, coroutine: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.exception("background_task_failed", error, task=task.get_name())

    async def close(self) -> None:
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
