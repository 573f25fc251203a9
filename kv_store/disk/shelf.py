"""Owns what the disk tier knows in memory: pages and their places, what the index log has still to be told, and the news. Pure.

The index, the table of segments, the lines and the news change together, under one lock that no I/O is done under.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kv_store.disk.index_log import Gone, Line, SegmentKnown, Stored
from kv_store.disk.layout import Layout
from kv_store.disk.recovery import Recovered
from kv_store.disk.segment_table import Resident, SegmentTable
from kv_store.page import Page, PageId
from kv_store.tier import Change, TierCounters
from kv_store.tier_index import Entry, TierIndex


@dataclass(frozen=True, slots=True)
class Pinned:
    """place: where the page was when it was pinned; its bytes stay there as long, even if the page moves."""

    entry: Entry
    place: int


@dataclass(frozen=True, slots=True)
class Move:
    """A copy of `entry`, as it was at `source`, is at `target`."""

    entry: Entry
    source: int
    target: int
    sequence: int


class Shelf:
    """Thread-safe."""

    def __init__(self, layout: Layout, index: TierIndex, counters: TierCounters) -> None:
        self._layout = layout
        self._index = index
        self._table = SegmentTable(layout)
        self._counters = counters
        self._lock = threading.Lock()
        self._unread = threading.Condition(self._lock)
        self._pins = 0
        self._shut = False
        self._lines: list[Line] = []
        self._news: list[tuple[Change, Page]] = []
        self._sequence = 1

    # ---- start

    def restore(self, found: Recovered, now_s: float) -> None:
        """Takes over what was found, and evicts what is too much by now."""
        with self._lock:
            self._sequence = found.sequence
            for number, first_sequence, slots in found.segments:
                self._table.restored(number, first_sequence, slots)
            for stored in found.pages:
                entry = self._index.begin(stored.page, self._layout.record_bytes, stored.place, stored.stored_s)
                self._table.occupy(stored.place, Resident(entry, stored.sequence))
                self._index.commit(entry)
                self._news.append(("stored", stored.page))
            self._evicted(self._index.trim(now_s), now_s)

    # ---- writing

    def admit(self, page: Page, now_s: float) -> bool:
        """Makes room. False where the page is here already or may not come in."""
        with self._lock:
            granted, evicted = self._index.make_room(page, self._layout.record_bytes, now_s)
            self._evicted(evicted, now_s)
        return granted

    def take(self) -> int | None:
        with self._lock:
            return self._table.take()

    def begin(self, page: Page, place: int, now_s: float) -> Resident:
        with self._lock:
            entry = self._index.begin(page, self._layout.record_bytes, place, now_s)
            resident = Resident(entry, self._next_sequence())
            self._table.occupy(place, resident)
        return resident

    def commit(self, batch: Iterable[Resident]) -> None:
        """Their bytes are on disk."""
        with self._lock:
            for resident in batch:
                self._index.commit(resident.entry)
                self._stored(resident)
                self._news.append(("stored", resident.entry.page))
                self._counters.stored += 1

    def abort(self, batch: Iterable[Resident]) -> None:
        with self._lock:
            for resident in batch:
                self._index.abort(resident.entry)
                self._table.vacate(resident.entry.place)
                self._wasted(resident.entry.place)

    # ---- segments

    def vacant(self) -> list[int]:
        with self._lock:
            return self._table.vacant()

    def files(self) -> int:
        with self._lock:
            return self._table.files

    def has_file(self, number: int) -> bool:
        with self._lock:
            return self._table.has_file(number)

    def next_sequence(self) -> int:
        with self._lock:
            return self._next_sequence()

    def begun(self, number: int, first_sequence: int) -> None:
        with self._lock:
            self._table.begun(number, first_sequence)

    def cheapest(self) -> int | None:
        with self._lock:
            return self._table.cheapest()

    def pages(self, number: int) -> list[Pinned]:
        """What is in a segment and may be moved. Nothing is pinned: `moved` sees what became of it."""
        with self._lock:
            found = self._table.pages(number)
            return [Pinned(each.entry, each.entry.place) for each in found if each.entry.state == "ready"]

    def moved(self, moves: Iterable[Move]) -> None:
        """The copies are on disk. A page that left meanwhile stays away."""
        with self._lock:
            for move in moves:
                entry = move.entry
                if entry.state != "ready" or entry.place != move.source:
                    self._wasted(move.target)
                    continue
                self._table.vacate(move.source)
                entry.place = move.target
                resident = Resident(entry, move.sequence)
                self._table.occupy(move.target, resident)
                self._stored(resident)

    def not_moved(self, moves: Iterable[Move]) -> None:
        """Their copies may be on disk or not, and do not count."""
        with self._lock:
            for move in moves:
                self._wasted(move.target)

    def give_up(self, number: int, now_s: float) -> None:
        """Evicts all that is in a segment, whoever reads it."""
        with self._lock:
            for resident in self._table.pages(number):
                if resident.entry.state == "ready":
                    self._counters.evicted += 1
                    self._counters.evicted_age_s += now_s - resident.entry.stored_s
                    self._drop(resident.entry)

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
            if bad.entry.state == "ready" and bad.entry.place == bad.place:
                self._drop(bad.entry)

    def remove(self, keys: Iterable[bytes]) -> int:
        with self._lock:
            found = [entry for key in keys if (entry := self._index.get(key)) is not None and entry.state == "ready"]
            for entry in found:
                self._drop(entry)
        return len(found)

    def expire(self, now_s: float) -> None:
        with self._lock:
            gone = self._index.expire(now_s)
            self._counters.expired += len(gone)
            self._left(gone)

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

    def take_lines(self) -> list[Line]:
        """What the index log was not told yet, in order."""
        with self._lock:
            lines, self._lines = self._lines, []
        return lines

    def snapshot(self) -> list[Line]:
        """All that a new index log needs to know; it then needs none of the lines up to now. What is known of a segment comes
        after its pages, and those in order: then the first part of a log is true as well."""
        with self._lock:
            self._lines = []
            ready = [item for item in self._table.residents() if item[1].entry.state == "ready"]
            lines: list[Line] = [
                Stored(place, resident.sequence, resident.entry.stored_s, resident.entry.page)
                for place, resident in sorted(ready, key=lambda item: item[0])
            ]
            return lines + [SegmentKnown(*known) for known in self._table.known()]

    def take_news(self) -> list[tuple[Change, Page]]:
        with self._lock:
            news, self._news = self._news, []
        return news

    # ---- parts

    def _pinned(self, entries: Iterable[Entry]) -> list[Pinned]:
        pinned = [Pinned(entry, entry.place) for entry in entries]
        self._pins += len(pinned)
        for each in pinned:
            self._table.reading(each.place)
        return pinned

    def _next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def _stored(self, resident: Resident) -> None:
        entry = resident.entry
        self._lines.append(Stored(entry.place, resident.sequence, entry.stored_s, entry.page))
        self._table.logged(entry.place)

    def _wasted(self, place: int) -> None:
        """Whatever was written there is no page, at the next start neither."""
        self._lines.append(SegmentKnown(*self._table.logged(place)))

    def _drop(self, entry: Entry) -> None:
        """Free now, or when its last reader is done."""
        freed = self._index.drop(entry.key)
        self._lines.append(Gone(entry.place))
        self._news.append(("evicted", entry.page))
        for each in freed:
            self._table.vacate(each.place)

    def _evicted(self, entries: Sequence[Entry], now_s: float) -> None:
        self._counters.evicted += len(entries)
        self._counters.evicted_age_s += sum(now_s - gone.stored_s for gone in entries)
        self._left(entries)

    def _left(self, entries: Iterable[Entry]) -> None:
        """They have no readers: the index chose them."""
        for entry in entries:
            self._lines.append(Gone(entry.place))
            self._news.append(("evicted", entry.page))
            self._table.vacate(entry.place)
