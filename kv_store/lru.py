"""Owns the least-recently-used eviction policy. Pure."""

from __future__ import annotations

from collections import OrderedDict

from kv_store.eviction import Evictable


class Lru:
    """Implements kv_store.eviction.EvictionPolicy."""

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()  # oldest first

    def added(self, key: bytes, size_bytes: int, saving_s: float) -> None:
        self._order[key] = None

    def hit(self, key: bytes) -> None:
        self._order.move_to_end(key)

    def victim(self, evictable: Evictable) -> bytes | None:
        return next((key for key in self._order if evictable(key)), None)

    def removed(self, key: bytes) -> None:
        del self._order[key]
