"""Owns lanes, each a UCX context for one peer alone, and the progress that drives them.

A context of its own, because its shared-memory queue is written by the peer's process: after one was killed inside a transfer
the queue was found deaf to everybody who writes to it (ADR 1). So nobody else does, and a lost peer's lane is thrown away.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from itertools import islice

from kv_transfer.transports.ucx_library import Context
from pdserve.errors import TransferFailed

IDLE_S = 0.01  # between progress calls while nothing is transferred
_SPINS = 4  # progress calls per turn of the loop: one that finds nothing costs half a microsecond
_POLLED_PER_TURN = 2
_ALL_EVERY = 16


class Lane:
    """One context. Driven by its pump from the start until `drop`."""

    def __init__(self, context: Context, pump: Pump) -> None:
        self._context: Context | None = context
        self._pump = pump
        self._users = 0
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

    async def until(self, ready: Callable[[], bool]) -> None:
        """Polls `ready` while the lane is driven; returns when it is true, raises what it raises."""
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._polls[waiting] = ready
        try:
            await waiting
        finally:
            del self._polls[waiting]

    def turn(self, spins: int, *, everyone: bool) -> None:
        """Messages come about in the order they were announced: probing all of them each time costs more than it finds."""
        if self._context is not None:
            for _ in range(spins):
                self._context.worker.progress()
        for waiting, ready in self._polls.items() if everyone else islice(self._polls.items(), _POLLED_PER_TURN):
            if waiting.done():
                continue
            try:
                if ready():
                    waiting.set_result(None)
            except TransferFailed as error:
                waiting.set_exception(error)

    def drop(self) -> None:
        """Gives the context back. Afterwards UCX touches none of the lane's buffers."""
        self._context = None
        self._pump.remove(self)


class Pump:
    """Drives the lanes of one event loop: busy ones at every turn, idle ones every few milliseconds."""

    def __init__(self) -> None:
        self._lanes: dict[Lane, None] = {}
        self._next: asyncio.Handle | None = None
        self._spinning = False
        self._turns = 0

    def add(self, lane: Lane) -> None:
        self._lanes[lane] = None
        self.wake()

    def remove(self, lane: Lane) -> None:
        self._lanes.pop(lane, None)

    def wake(self) -> None:
        if not self._spinning:
            self.stop()
            self._spinning = True
            self._next = asyncio.get_running_loop().call_soon(self._turn)

    def stop(self) -> None:
        if self._next is not None:
            self._next.cancel()
        self._next, self._spinning = None, False

    def _turn(self) -> None:
        self._turns += 1
        busy = [lane for lane in self._lanes if lane.busy]
        everyone = not busy or self._turns % _ALL_EVERY == 0
        for lane in list(self._lanes) if everyone else busy:
            lane.turn(_SPINS if lane.busy else 1, everyone=everyone)
        self._spinning = bool(busy)
        loop = asyncio.get_running_loop()
        if busy:
            self._next = loop.call_soon(self._turn)
        else:
            self._next = loop.call_later(IDLE_S, self._turn) if self._lanes else None
