"""Owns a queue of pages in the order in which they leave, in which pages that may not leave now do not stand in the way. Pure.

A page that is passed over (it is read, held, or has children) is parked: behind it others leave without asking it each time. The
first that are asked again are those that have lost their last child. Nobody tells the queue when a page is not read or held any
more, so it asks a few others too: the last ones parked, and the oldest ones in turn. It asks all of them only where nothing else
can leave.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice

from kv_store.eviction import Evictable

ASKED_LAST = 8
ASKED_OLDEST = 2

Spared = Callable[[bytes], bool]


def _none_spared(key: bytes) -> bool:
    return False


class Parked:
    """Pages that were passed over, in that order."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()
        self._bared: OrderedDict[bytes, None] = (
            OrderedDict()
        )  # of them, those whose last child left since they were asked

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def park(self, key: bytes) -> None:
        self._keys[key] = None

    def leave(self, key: bytes) -> None:
        del self._keys[key]
        self._bared.pop(key, None)

    def bared(self, key: bytes) -> None:
        """Its last child left. Without effect where it is not parked."""
        if key in self._keys:
            self._bared[key] = None

    def some(self, evictable: Evictable) -> bytes | None:
        """One that may leave, of those that are likely to. O(1), but for those that lost their children, each asked once for that."""
        while self._bared:
            key = next(iter(self._bared))
            if evictable(key):
                return key
            del self._bared[key]
        for key in islice(reversed(self._keys), ASKED_LAST):
            if evictable(key):
                return key
        for key in list(islice(self._keys, ASKED_OLDEST)):
            if evictable(key):
                return key
            self._keys.move_to_end(key)
        return None

    def any(self, evictable: Evictable) -> bytes | None:
        """One that may leave, if there is one. O(n)."""
        return next((key for key in self._keys if evictable(key)), None)


class EvictionQueue:
    """First in, first out, except for what is parked."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[bytes, None] = OrderedDict()
        self._parked = Parked()

    def push(self, key: bytes) -> None:
        """To the end, out of whatever place it has here."""
        if key in self._parked:
            self._parked.leave(key)
        self._waiting[key] = None
        self._waiting.move_to_end(key)

    def leave(self, key: bytes) -> None:
        if key in self._parked:
            self._parked.leave(key)
        else:
            del self._waiting[key]

    def bared(self, key: bytes) -> None:
        """Its last child left. Without effect where it was not passed over."""
        self._parked.bared(key)

    def first(self, evictable: Evictable, spared: Spared = _none_spared) -> bytes | None:
        """The page to leave next; it stays until `leave`. None where only a parked page that was not asked may leave.

        spared: asked of each page whose turn it is. Where it answers True, it has pushed the page to the end or made it leave; it
        does so a limited number of times per page, otherwise this does not end.
        """
        parked = self._parked.some(evictable)
        while parked is not None and spared(parked):
            parked = self._parked.some(evictable)
        if parked is not None:
            return parked
        while self._waiting:
            key = next(iter(self._waiting))
            if spared(key):
                continue
            if evictable(key):
                return key
            del self._waiting[key]
            self._parked.park(key)
        return None

    def last_resort(self, evictable: Evictable) -> bytes | None:
        """Any parked page that may leave. O(n): for when there is no other way."""
        return self._parked.any(evictable)
