"""Owns lanes, each a UCX context for one peer alone, driven by a pump.

A context of its own, because its shared-memory queue is written by the peer's process: after one was killed inside a transfer
the queue was found deaf to everybody who writes to it (ADR 1). So nobody else does, and a lost peer's lane is thrown away.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from itertools import islice

from kv_transfer.transports.pump import Pump
from kv_transfer.transports.ucx_library import Context
from pdserve.errors import TransferFailed

Steps = Coroutine[None, None, None]  # an operation of the library: yields until it is complete

_POLLED_PER_TURN = 2


class Lane:
    """One context. Driven by its pump from the start until `drop`."""

    def __init__(self, context: Context, pump: Pump) -> None:
        self._context: Context | None = context
        context.worker.init_blocking_progress_mode()  # makes the descriptor; it is still driven by us alone
        self._pump = pump
        self._users = 0
        self._meeting = 0
        self._polls: dict[asyncio.Future[None], Callable[[], bool]] = {}
        self._operations: dict[asyncio.Future[None], Steps] = {}
        pump.add(self)

    @property
    def context(self) -> Context:
        if self._context is None:
            raise TransferFailed("KV connection is closed.")
        return self._context

    @property
    def busy(self) -> bool:
        return self._users > 0

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Progress at every turn of the loop inside."""
        self._users += 1
        self._pump.wake()
        try:
            yield
        finally:
            self._users -= 1

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """`active`, and the core is kept: the peer comes in over sockets and UCX's own thread, within a deadline."""
        self._meeting += 1
        try:
            with self.active():
                yield
        finally:
            self._meeting -= 1

    async def until(self, ready: Callable[[], bool]) -> None:
        """Polls `ready` while the lane is driven; returns when it is true, raises what it raises."""
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._polls[waiting] = ready
        self.wake()
        try:
            await waiting
        finally:
            del self._polls[waiting]

    def start(self, steps: Steps) -> asyncio.Future[None]:
        """Begins an operation now; turns complete it. A task of its own for each would turn the loop until it is complete.

        Who cancels the future abandons the operation: what it does with its buffer ends with the lane at the latest.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not _step(steps, done):
            self._operations[done] = steps
            self.wake()
        return done

    def wake(self) -> None:
        """There is news for `ready` or an operation that did not come over the lane."""
        self._pump.wake()

    def turn(self, spins: int, *, everyone: bool) -> bool:
        """Messages come about in the order they were announced: probing all of them each time costs more than it finds."""
        moved = self._progress(spins)
        if moved or everyone:
            moved |= self._step_operations()
        for waiting, ready in self._polls.items() if everyone else islice(self._polls.items(), _POLLED_PER_TURN):
            if waiting.done():
                continue
            try:
                if ready():
                    moved = True
                    waiting.set_result(None)
            except TransferFailed as error:
                waiting.set_exception(error)
        return moved or self._meeting > 0

    def arm(self) -> int | None:
        """See `pump.Turned`. The first try often finds the event of what was progressed before."""
        if self._context is None or self._meeting:
            return None
        worker = self._context.worker
        if worker.arm() or (not worker.progress_once() and worker.arm()):
            return worker.epoll_file_descriptor
        return None

    def _step_operations(self) -> bool:
        """True where one was completed."""
        over = [done for done, steps in self._operations.items() if done.done() or _step(steps, done)]
        for done in over:
            self._operations.pop(done).close()
        return bool(over)

    def _progress(self, spins: int) -> bool:
        if self._context is None:
            return False
        worker = self._context.worker
        for spin in range(spins):
            if not worker.progress_once():
                return spin > 0
        return True

    def drop(self) -> None:
        """Gives the context back. Afterwards UCX touches none of the lane's buffers."""
        self._pump.remove(self)
        for steps in self._operations.values():
            steps.close()
        self._operations.clear()
        self._context = None


def _step(steps: Steps, done: asyncio.Future[None]) -> bool:
    """True where it is complete, which `done` says."""
    try:
        steps.send(None)
    except StopIteration:
        done.set_result(None)
    except Exception as error:
        done.set_exception(error)
    else:
        return False
    return True
