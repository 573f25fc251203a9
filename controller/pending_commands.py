"""Owns the operator commands that a worker has yet to answer: their numbers, their waiters, their deadline."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass

from pdserve.errors import DeadlineExceeded, PdserveError

ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class PendingCommand:
    worker_id: str
    answer: asyncio.Future[None]


class PendingCommands:
    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._pending: dict[int, PendingCommand] = {}

    def next_id(self) -> int:
        return next(self._numbers)

    def expect(self, worker_id: str) -> int:
        """The number of a command whose answer will be waited for."""
        command_id = self.next_id()
        self._pending[command_id] = PendingCommand(worker_id, asyncio.get_running_loop().create_future())
        return command_id

    async def answer(self, command_id: int) -> None:
        """Raises what the worker answered, DeadlineExceeded, or WorkerLost."""
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._pending[command_id].answer
        except TimeoutError as error:
            raise DeadlineExceeded(f"The worker did not answer within {ANSWER_S:g} s.") from error
        finally:
            del self._pending[command_id]

    def settle(self, command_id: int, error: PdserveError | None) -> None:
        """Answers that nobody waits for change nothing."""
        pending = self._pending.get(command_id)
        if pending is None or pending.answer.done():
            return
        if error is None:
            pending.answer.set_result(None)
        else:
            pending.answer.set_exception(error)

    def worker_lost(self, worker_id: str, error: PdserveError) -> None:
        for command_id, pending in self._pending.items():
            if pending.worker_id == worker_id:
                self.settle(command_id, error)
