"""Owns the tasks that serve the workers' sessions: at most one for each worker."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine


class SessionTasks:
    def __init__(self) -> None:
        self._serving: dict[str, asyncio.Task[None]] = {}

    def start(self, worker_id: str, serving: Coroutine[None, None, None]) -> None:
        """Instead of the one before."""
        self.end(worker_id)
        self._serving[worker_id] = asyncio.create_task(serving)

    def end(self, worker_id: str) -> None:
        """A task may end itself so: it is let go, and returns by itself."""
        task = self._serving.pop(worker_id, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    async def close(self) -> None:
        tasks = list(self._serving.values())
        self._serving.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
