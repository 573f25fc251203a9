"""Owns a scripted worker's session with one controller: events, numbered and kept until they are acknowledged."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from pdserve.v1 import worker_pb2


@dataclass
class TwinSession:
    controller_id: str
    unacknowledged: deque[worker_pb2.SessionResponse] = field(default_factory=deque)
    next_sequence: int = 1
    queue: asyncio.Queue[worker_pb2.SessionResponse | None] = field(default_factory=asyncio.Queue)
    opened: int = 0

    async def open(self, snapshot: worker_pb2.SessionResponse) -> AsyncIterator[worker_pb2.SessionResponse]:
        """What one stream carries: the snapshot, what an earlier one may have lost, then the news until `break_off`."""
        self.opened += 1
        queue = self.queue = asyncio.Queue()
        yield snapshot
        for response in list(self.unacknowledged):
            yield response
        while (response_or_end := await queue.get()) is not None:
            yield response_or_end

    def tell(self, response: worker_pb2.SessionResponse) -> None:
        response.sequence = self.next_sequence
        self.next_sequence += 1
        self.unacknowledged.append(response)
        self.queue.put_nowait(response)

    def tell_unnumbered(self, response: worker_pb2.SessionResponse) -> None:
        self.queue.put_nowait(response)

    def acknowledge(self, sequence: int) -> None:
        while self.unacknowledged and self.unacknowledged[0].sequence <= sequence:
            self.unacknowledged.popleft()

    def break_off(self) -> None:
        self.queue.put_nowait(None)
