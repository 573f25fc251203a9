"""Owns the running generators of one HTTP request: their news merged in order of arrival, and the watch on the client.

A task per generator pumps into one list, so that whatever has piled up goes out in one write, and so that silence can
be noticed without cancelling the generator.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import TypeAlias, cast

from starlette.types import Receive

from controller.request import Begun, Delta

MAX_PENDING = 1024
CLOSE_TIMEOUT_S = 5.0
QUIET_TICKS = 2  # of a timer at half the keep-alive time: silence is broken after 1 to 1.5 times it

Item: TypeAlias = tuple[int, Begun | Delta]


class ClientGone(Exception):
    """The client closed its connection: nobody is left to answer."""


class NewsStream:
    """`async with`: leaving the block closes every generator, which cancels its request in every process."""

    def __init__(
        self, generators: Sequence[AsyncIterator[Begun | Delta]], receive: Receive, keepalive_s: float
    ) -> None:
        self._generators = generators
        self._receive = receive
        self._tick_s = keepalive_s / QUIET_TICKS
        self._pending: list[Item] = []
        self._running = len(generators)
        self._error: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._room = asyncio.Event()
        self._room.set()
        self._quiet_ticks = 0
        self._ticker: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> NewsStream:
        pumps = [self._pump(place, generator) for place, generator in enumerate(self._generators)]
        self._tasks = [asyncio.create_task(work) for work in [*pumps, self._watch()]]
        self._ticker = self._loop.call_later(self._tick_s, self._tick)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks, timeout=CLOSE_TIMEOUT_S)

    async def take(self) -> list[Item] | None:
        """All that has arrived, at least one item; [] after a while of silence; None at the end.

        Raises ClientGone, or the first error of a generator once what came before it has been taken.
        """
        if not self._pending and self._error is None and self._running:
            self._waiter = self._loop.create_future()
            await self._waiter
        if isinstance(self._error, ClientGone):
            raise self._error
        if self._pending:
            items, self._pending, self._quiet_ticks = self._pending, [], 0
            self._room.set()
            return items
        if self._error is not None:
            raise self._error
        return [] if self._running else None

    def _wake(self) -> None:
        if self._waiter is not None:
            if not self._waiter.done():
                self._waiter.set_result(None)
            self._waiter = None

    def _tick(self) -> None:
        """One timer per stream, because a deadline per wait costs more than the event it waits for."""
        self._ticker = self._loop.call_later(self._tick_s, self._tick)
        self._quiet_ticks += 1
        if self._quiet_ticks > QUIET_TICKS:
            self._quiet_ticks = 1
            self._wake()

    async def _pump(self, place: int, generator: AsyncIterator[Begun | Delta]) -> None:
        try:
            # The protocol says that generators can be closed; its type does not.
            async with aclosing(cast(AsyncGenerator[Begun | Delta, None], generator)) as stream:
                async for news in stream:
                    self._pending.append((place, news))
                    self._wake()
                    if len(self._pending) >= MAX_PENDING:
                        self._room.clear()
                        await self._room.wait()
        except Exception as error:  # carried to `take`, which raises it
            self._error = self._error or error
        finally:
            self._running -= 1
            self._wake()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._error = ClientGone()
        self._wake()
