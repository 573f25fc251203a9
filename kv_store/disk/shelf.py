"""Owns the readers' side of the disk tier's ledger: what is there, what is read just now, what leaves. Pure."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from kv_store.disk.ledger import Ledger, Pinned
from kv_store.page import Page, PageId
from kv_store.tier import Change
from kv_store.tier_index import Entry


class Shelf:
    """Thread-safe."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._index = ledger.index
        self._table = ledger.table
        self._lock = ledger.lock
        self._unread = threading.Condition(ledger.lock)
        self._pins = 0
        self._shut = False

    # ---- reading

    def present(self, ids: Sequence[PageId], now_s: float) -> int:
        with self._lock:
            return 0 if self._shut else self._index.present(ids, now_s)

    def here(self, pages: Iterable[Page], now_s: float) -> int:
        """How many of `pages`, wherever among them."""
        with self._lock:
            return sum(self._index.present([page.id], now_s) for page in pages)

    def pin(self, ids: Sequence[PageId], now_s: float) -> list[Pinned]:
        with self._lock:
            return [] if self._shut else self._pinned(self._index.pin(ids, now_s))

    def look(self, key: bytes) -> list[Pinned]:
        """Like `pin`, for one page, and no hit."""
        with self._lock:
            return [] if self._shut else self._pinned(self._index.look(key))

    def unpin(self, pinned: Sequence[Pinned]) -> None:
        with self._lock:
            for each in pinned:
                self._table.done_reading(each.place)
            for entry in self._index.unpin(each.entry for each in pinned):
                self._table.vacate(entry.place)
            self._pins -= len(pinned)
            self._unread.notify_all()

    def shut(self) -> None:
        """Nothing can be found from now on; returns when nothing is read any more."""
        with self._unread:
            self._shut = True
            self._unread.wait_for(lambda: not self._pins)

    # ---- leaving

    def drop_bad(self, bad: Pinned) -> None:
        """What was read at that place is not the page."""
        with self._lock:
            self._ledger.drop_bad(bad)

    def remove(self, keys: Iterable[bytes]) -> int:
        with self._lock:
            found = [entry for key in keys if (entry := self._index.get(key)) is not None and entry.state == "ready"]
            for entry in found:
                self._ledger.drop(entry)
        return len(found)

    def expire(self, now_s: float) -> None:
        with self._lock:
            self._ledger.expire(now_s)

    def hold(self, key: bytes, until_s: float) -> bool:
        with self._lock:
            return self._index.hold(key, until_s)

    # ---- what is told

    def used_bytes(self) -> int:
        return self._index.used_bytes

    def pages_held(self) -> int:
        with self._lock:
            return len(self._index)

    def entries(self) -> list[Entry]:
        with self._lock:
            return [entry for entry in self._index if entry.state == "ready"]

    def take_news(self) -> list[tuple[Change, Page]]:
        with self._lock:
            return self._ledger.take_news()

    # ---- parts

    def _pinned(self, entries: Iterable[Entry]) -> list[Pinned]:
        pinned = [Pinned(entry, entry.place) for entry in entries]
        self._pins += len(pinned)
        for each in pinned:
            self._table.reading(each.place)
        return pinned
