"""Owns what the disk tier knows in memory: pages and their places, what the index log has still to be told, and the news. Pure.

The index, the table of segments, the lines and the news change together, under one lock that no I/O is done under. Two sides hold
it: `kv_store.disk.shelf`, which finds pages, and `kv_store.disk.places`, which puts them there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kv_store.disk.index_log import Gone, Line, SegmentKnown, Stored
from kv_store.disk.layout import Layout
from kv_store.disk.recovery import Recovered
from kv_store.disk.segment_table import Resident, SegmentTable
from kv_store.page import Page
from kv_store.tier import Change, TierCounters
from kv_store.tier_index import Entry, TierIndex


@dataclass(frozen=True, slots=True)
class Pinned:
    """place: where the page was when it was pinned; its bytes stay there as long, even if the page moves."""

    entry: Entry
    place: int


class Ledger:
    """Not thread-safe: whoever uses it, its index and its table holds `lock`."""

    def __init__(self, layout: Layout, index: TierIndex, counters: TierCounters) -> None:
        self.lock = threading.Lock()
        self.layout = layout
        self.index = index
        self.table = SegmentTable(layout)
        self._counters = counters
        self._lines: list[Line] = []
        self._news: list[tuple[Change, Page]] = []
        self._sequence = 1

    def restore(self, found: Recovered, now_s: float) -> None:
        """Takes over what was found, and evicts what is too much by now."""
        self._sequence = found.sequence
        for number, first_sequence, slots in found.segments:
            self.table.restored(number, first_sequence, slots)
        for stored in found.pages:
            entry = self.index.begin(stored.page, self.layout.record_bytes, stored.place, stored.stored_s)
            self.table.occupy(stored.place, Resident(entry, stored.sequence))
            self.index.commit(entry)
            self._news.append(("stored", stored.page))
        self.evicted(self.index.trim(now_s), now_s)

    def next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    # ---- coming

    def stored(self, resident: Resident) -> None:
        self.index.commit(resident.entry)
        self.placed(resident)
        self._news.append(("stored", resident.entry.page))
        self._counters.stored += 1

    def placed(self, resident: Resident) -> None:
        """Its record is on disk at its place."""
        entry = resident.entry
        self._lines.append(Stored(entry.place, resident.sequence, entry.stored_s, entry.page))
        self.table.logged(entry.place)

    def wasted(self, place: int) -> None:
        """Whatever was written there is no page, at the next start neither."""
        self._lines.append(SegmentKnown(*self.table.logged(place)))

    # ---- leaving

    def drop(self, entry: Entry) -> None:
        """Free now, or when its last reader is done."""
        freed = self.index.drop(entry.key)
        self._gone(entry)
        for each in freed:
            self.table.vacate(each.place)

    def drop_bad(self, bad: Pinned) -> None:
        """What was read at that place is not the page."""
        if bad.entry.state == "ready" and bad.entry.place == bad.place:
            self.drop(bad.entry)

    def evicted(self, entries: Sequence[Entry], now_s: float) -> None:
        """They have no readers: the index chose them."""
        self._count_evicted(entries, now_s)
        self._left(entries)

    def evict(self, entry: Entry, now_s: float) -> None:
        """Whoever reads it."""
        self._count_evicted([entry], now_s)
        self.drop(entry)

    def expire(self, now_s: float) -> None:
        gone = self.index.expire(now_s)
        self._counters.expired += len(gone)
        self._left(gone)

    # ---- what is told

    def take_lines(self) -> list[Line]:
        """What the index log was not told yet, in order."""
        lines, self._lines = self._lines, []
        return lines

    def snapshot(self) -> list[Line]:
        """All that a new index log needs to know; it then needs none of the lines up to now. What is known of a segment comes
        after its pages, and those in order: then the first part of a log is true as well."""
        self._lines = []
        ready = [item for item in self.table.residents() if item[1].entry.state == "ready"]
        lines: list[Line] = [
            Stored(place, resident.sequence, resident.entry.stored_s, resident.entry.page)
            for place, resident in sorted(ready, key=lambda item: item[0])
        ]
        return lines + [SegmentKnown(*known) for known in self.table.known()]

    def take_news(self) -> list[tuple[Change, Page]]:
        news, self._news = self._news, []
        return news

    # ---- parts

    def _left(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._gone(entry)
            self.table.vacate(entry.place)

    def _gone(self, entry: Entry) -> None:
        self._lines.append(Gone(entry.place))
        self._news.append(("evicted", entry.page))

    def _count_evicted(self, entries: Sequence[Entry], now_s: float) -> None:
        self._counters.evicted += len(entries)
        self._counters.evicted_age_s += sum(now_s - gone.stored_s for gone in entries)
