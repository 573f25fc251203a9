"""Owns an outbox: messages put without waiting, taken in order by the one task that writes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

Message = TypeVar("Message")


class Outbox(Generic[Message]):
    """Bounded by its users: each puts at most one message per message received, per beat or per free slot of a window."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Message | None] = asyncio.Queue()
        self._closed = False

    def put(self, message: Message) -> None:
        """Dropped after `close`: the stream has said its last word."""
        if not self._closed:
            self._queue.put_nowait(message)

    def close(self) -> None:
        """What was put before is still taken."""
        if not self._closed:
            self._closed = True
            self._queue.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[Message]:
        while (message := await self._queue.get()) is not None:
            yield message
