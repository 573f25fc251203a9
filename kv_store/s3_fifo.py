"""Owns the S3-FIFO eviction policy (Yang et al., SOSP 2023, section 4). Pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from kv_store.eviction import Evictable
from kv_store.eviction_queue import EvictionQueue

SMALL_SHARE = 0.1
MAX_USES = 3  # uses beyond are not counted
USES_TO_MAIN = 1  # while in the small queue


@dataclass(slots=True)
class _Counted:
    size_bytes: int
    uses: int
    main: bool


class S3Fifo:
    """Implements kv_store.eviction.EvictionPolicy. Pages that are used once leave early, through a small queue.

    It knows no capacity: it is asked for victims when the tier is full, and then what is here is the capacity.
    """

    def __init__(self) -> None:
        self._pages: dict[bytes, _Counted] = {}
        self._small = EvictionQueue()
        self._main = EvictionQueue()
        self._ghost: OrderedDict[bytes, int] = OrderedDict()  # evicted from the small queue: key -> bytes
        self._small_bytes = 0
        self._main_bytes = 0
        self._ghost_bytes = 0
        self._victim: bytes | None = None

    def added(self, key: bytes, size_bytes: int, saving_s: float) -> None:
        known = self._ghost.pop(key, None)
        self._ghost_bytes -= known or 0
        page = _Counted(size_bytes, 0, main=known is not None)
        self._pages[key] = page
        if page.main:
            self._main.push(key)
            self._main_bytes += size_bytes
        else:
            self._small.push(key)
            self._small_bytes += size_bytes

    def hit(self, key: bytes) -> None:
        page = self._pages[key]
        page.uses = min(page.uses + 1, MAX_USES)

    def victim(self, evictable: Evictable) -> bytes | None:
        key = None
        if self._small_bytes >= SMALL_SHARE * (self._small_bytes + self._main_bytes):
            key = self._small.first(evictable, self._moved_to_main)
        key = key or self._main.first(evictable, self._sent_back)
        key = key or self._small.first(evictable, self._moved_to_main)
        self._victim = key or self._small.last_resort(evictable) or self._main.last_resort(evictable)
        return self._victim

    def bared(self, key: bytes) -> None:
        self._small.bared(key)
        self._main.bared(key)

    def removed(self, key: bytes) -> None:
        page = self._pages.pop(key)
        if page.main:
            self._main.leave(key)
            self._main_bytes -= page.size_bytes
        else:
            self._small.leave(key)
            self._small_bytes -= page.size_bytes
            if key == self._victim:
                self._remember(key, page.size_bytes)
        self._victim = None

    def _moved_to_main(self, key: bytes) -> bool:
        page = self._pages[key]
        if page.uses < USES_TO_MAIN:
            return False
        page.uses, page.main = 0, True
        self._small.leave(key)
        self._small_bytes -= page.size_bytes
        self._main.push(key)
        self._main_bytes += page.size_bytes
        return True

    def _sent_back(self, key: bytes) -> bool:
        page = self._pages[key]
        if not page.uses:
            return False
        page.uses -= 1
        self._main.push(key)
        return True

    def _remember(self, key: bytes, size_bytes: int) -> None:
        self._ghost[key] = size_bytes
        self._ghost_bytes += size_bytes
        while self._ghost_bytes > self._main_bytes and len(self._ghost) > 1:
            self._ghost_bytes -= self._ghost.popitem(last=False)[1]
