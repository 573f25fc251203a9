"""Owns which clients have stopped taking what they are sent: as many bytes wait for them as a while ago. Pure.

Nothing is written to a connection whose buffer is full, so that there a length that stays says that nothing was taken. Where the
buffer still has room, what is written changes its length: such a client is not judged before its buffer is full, or its answer ends.

The length must count what the kernel holds too: a socket takes more only once a large part of its own buffer has drained, so that the
buffer alone stands still for seconds under a client that reads slowly. What the client's kernel holds cannot be seen, and it asks for
more in steps too: a client is cut that takes less than such a step, up to half of its receive buffer, in the time.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

Connection = TypeVar("Connection", bound=Hashable)


class StalledClients(Generic[Connection]):
    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._unmoved: dict[Connection, tuple[int, float]] = {}  # bytes, since when it is just these

    def look(self, waiting_bytes: Mapping[Connection, int], now: float) -> list[Connection]:
        """Of all open connections, how much of what was written to each has not reached it: those where none of it has moved."""
        before, self._unmoved = self._unmoved, {}
        for connection, size_bytes in waiting_bytes.items():
            if size_bytes > 0:
                size_before, since_s = before.get(connection, (0, now))
                self._unmoved[connection] = (size_bytes, since_s if size_before == size_bytes else now)
        return [connection for connection, (_, since_s) in self._unmoved.items() if now - since_s >= self._stall_s]
