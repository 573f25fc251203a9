"""Owns lanes, each a UCX context for one peer alone, driven by a pump.

A context of its own, because its shared-memory queue is written by the peer's process: after one was killed inside a transfer
the queue was found deaf to everybody who writes to it (ADR 1). So nobody else does, and a lost peer's lane is thrown away.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from itertools import islice

from kv_transfer.transports.pump import Pump
from kv_transfer.transports.ucx_library import Context
from pdserve.errors import TransferFailed

_POLLED_PER_TURN = 2


class Lane:
    """One context. Driven by its pump from the start until `drop`."""

    def __init__(self, context: Context, pump: Pump) -> None:
        self._context: Context | None = context
        self._pump = pump
        self._users = 0
        self._meeting = 0
        self._polls: dict[asyncio.Future[None], Callable[[], bool]] = {}
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
        try:
            await waiting
        finally:
            del self._polls[waiting]

    def turn(self, spins: int, *, everyone: bool) -> bool:
        """Messages come about in the order they were announced: probing all of them each time costs more than it finds."""
        moved = self._progress(spins)
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
        self._context = None
        self._pump.remove(self)
