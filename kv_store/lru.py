"""Owns the least-recently-used eviction policy. Pure."""

from __future__ import annotations

from kv_store.eviction import Evictable
from kv_store.eviction_queue import EvictionQueue


class Lru:
    """Implements kv_store.eviction.EvictionPolicy. Oldest first, except that the oldest may have to be passed over."""

    def __init__(self) -> None:
        self._queue = EvictionQueue()

    def added(self, key: bytes, size_bytes: int, saving_s: float) -> None:
        self._queue.push(key)

    def hit(self, key: bytes) -> None:
        self._queue.push(key)

    def victim(self, evictable: Evictable) -> bytes | None:
        return self._queue.first(evictable) or self._queue.last_resort(evictable)

    def bared(self, key: bytes) -> None:
        self._queue.bared(key)

    def removed(self, key: bytes) -> None:
        self._queue.leave(key)
