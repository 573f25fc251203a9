"""Owns the operator commands that a worker has yet to answer: their numbers, their waiters, their deadline."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass

from pdserve.errors import DeadlineExceeded, PdserveError
from pdserve.v1 import worker_pb2

ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class PendingCommand:
    worker_id: str
    answer: asyncio.Future[worker_pb2.CommandResult]


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

    async def answer(self, command_id: int) -> worker_pb2.CommandResult:
        """Of a command that was done. Raises what the worker answered, DeadlineExceeded, or WorkerLost."""
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self._pending[command_id].answer
        except TimeoutError as error:
            raise DeadlineExceeded(f"The worker did not answer within {ANSWER_S:g} s.") from error
        finally:
            del self._pending[command_id]

    def settle(self, command_id: int, answer: worker_pb2.CommandResult | PdserveError) -> None:
        """Answers that nobody waits for change nothing."""
        pending = self._pending.get(command_id)
        if pending is None or pending.answer.done():
            return
        if isinstance(answer, PdserveError):
            pending.answer.set_exception(answer)
        else:
            pending.answer.set_result(answer)

    def worker_lost(self, worker_id: str, error: PdserveError) -> None:
        for command_id, pending in self._pending.items():
            if pending.worker_id == worker_id:
                self.settle(command_id, error)
