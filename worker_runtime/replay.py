"""Owns the replay buffer of a session: sequenced events, kept until the controller acknowledges them. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


class ReplayOverflow(Exception):
    """The controller acknowledged too little for too long; what it lacks cannot be kept."""


@dataclass(frozen=True, slots=True)
class Entry(Generic[Item]):
    sequence: int
    item: Item
    size_bytes: int


class ReplayBuffer(Generic[Item]):
    """Sequences start at `first_sequence` and have no gap; those up to the acknowledged one are gone."""

    def __init__(self, limit_bytes: int, first_sequence: int = 1) -> None:
        self._limit_bytes = limit_bytes
        self._entries: deque[Entry[Item]] = deque()
        self._size_bytes = 0
        self._next = first_sequence
        self._acknowledged = first_sequence - 1

    @property
    def next_sequence(self) -> int:
        return self._next

    @property
    def acknowledged(self) -> int:
        return self._acknowledged

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def append(self, item: Item, size_bytes: int) -> int:
        """Returns the item's sequence, which was `next_sequence`. Raises ReplayOverflow and keeps nothing of it."""
        if self._size_bytes + size_bytes > self._limit_bytes:
            raise ReplayOverflow(f"more than {self._limit_bytes} bytes wait for the controller's acknowledgement")
        self._entries.append(Entry(self._next, item, size_bytes))
        self._size_bytes += size_bytes
        self._next += 1
        return self._next - 1

    def acknowledge(self, sequence: int) -> None:
        """Forgets everything up to `sequence`; one that is old or was never issued changes nothing."""
        if sequence >= self._next:
            return
        while self._entries and self._entries[0].sequence <= sequence:
            self._size_bytes -= self._entries.popleft().size_bytes
        self._acknowledged = max(self._acknowledged, sequence)

    def clear(self) -> None:
        """Forgets everything; `next_sequence` stays."""
        self._entries.clear()
        self._size_bytes = 0

    def after(self, sequence: int) -> Entry[Item] | None:
        """The first entry that is kept and follows `sequence`."""
        if not self._entries or sequence >= self._entries[-1].sequence:
            return None
        return self._entries[max(0, sequence + 1 - self._entries[0].sequence)]
