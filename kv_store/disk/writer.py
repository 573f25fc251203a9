"""Owns the way of pages onto the disk: a place for each, compaction where no segment is free, one sync per batch, then the index.

Compaction copies what is alive in the segment with the fewest pages into the one that is kept free for this, and frees the whole
segment. Dead places are used again in no other way, so a page that failed its check stays out of use until then.
"""

from __future__ import annotations

from collections.abc import Sequence

from kv_store.disk.device import Disk
from kv_store.disk.layout import Layout
from kv_store.disk.ledger import Pinned
from kv_store.disk.places import Move, Places
from kv_store.disk.segment_log import SegmentLog
from kv_store.disk.segment_table import Resident
from kv_store.page import Page, PageBytes
from kv_store.tier import TierCounters

_PAGES_PER_LOCK = 32  # so that readers do not wait for long


class Writer:
    """Its owner calls one method at a time. All raise OSError."""

    def __init__(self, disk: Disk, log: SegmentLog, places: Places, layout: Layout, counters: TierCounters) -> None:
        self._disk = disk
        self._log = log
        self._places = places
        self._layout = layout
        self._counters = counters
        self.pages_moved = 0

    def store(self, pages: Sequence[Page], contents: Sequence[PageBytes], now_s: float) -> None:
        """Stores what is absent and has room; all of it is on disk and can be found when this returns, nothing of it after an
        error."""
        assert len(pages) == len(contents)
        batch: list[Resident] = []
        start = 0
        try:
            while start < len(pages):
                asked = pages[start : start + _PAGES_PER_LOCK]
                begun = self._places.begin_all(asked, now_s)
                batch += [resident for _, resident in begun.residents]
                for at, resident in begun.residents:
                    self._write(resident, contents[start + at], now_s)
                start += begun.seen
                if begun.seen < len(asked):
                    place = self._place(now_s)
                    if place is not None:
                        batch.append(self._places.begin(pages[start], place, now_s))
                        self._write(batch[-1], contents[start], now_s)
                    start += 1
            self._log.sync()
        except BaseException:
            self._log.discard()
            self._places.abort(batch)
            raise
        self._places.commit(batch)
        self._counters.bytes_in += len(batch) * self._layout.payload_bytes

    # ---- parts

    def _write(self, resident: Resident, content: PageBytes, now_s: float) -> None:
        entry = resident.entry
        self._log.write(entry.place, entry.page, content, now_s, resident.sequence)

    def _place(self, now_s: float) -> int | None:
        """The first one of a segment that is begun for it."""
        vacant = self._places.vacant()
        if not vacant:  # a crash in the middle of a compaction leaves it like this, and so do slow readers
            self._give_up_a_segment(now_s)
            vacant = self._places.vacant()
        if vacant:
            self._begin(vacant[0])
        if len(vacant) == 1:
            self._compact()
        return self._places.take()

    def _give_up_a_segment(self, now_s: float) -> None:
        number = self._places.cheapest()
        if number is not None:
            self._places.give_up(number, now_s)

    def _begin(self, number: int) -> None:
        if not self._places.has_file(number):
            self._make_room_beside_others()
        sequence = self._places.next_sequence()
        self._log.begin(number, sequence)
        self._places.begun(number, sequence)

    def _compact(self) -> None:
        number = self._places.cheapest()
        pages = self._places.movable(number) if number is not None else []
        if len(pages) == self._layout.slots:
            return
        moves: list[Move] = []
        try:
            for page in pages:
                self._copy(page, moves)
            self._log.sync()
        except BaseException:
            self._places.not_moved(moves)
            raise
        self._places.moved(moves)
        self.pages_moved += len(moves)

    def _copy(self, page: Pinned, moves: list[Move]) -> None:
        """A page that turns out bad is dropped, and its move will find it gone."""
        move = self._places.move(page)
        moves.append(move)
        failure = self._log.copy(page.place, move.target, page.entry.page.id, move.sequence)
        if failure is not None:
            self._counters.verify_failures[failure] += 1
            self._places.drop_bad(page)

    def _make_room_beside_others(self) -> None:
        """Files of other formats lie in the same directory, from other models that ran here: they leave before it grows too big."""
        sizes = self._disk.sizes()
        others = sorted(name for name in sizes if not name.startswith(f"{self._log.folder}/"))
        most_bytes = self._layout.total_bytes - (self._places.files() + 1) * self._layout.segment_bytes
        taken = sum(sizes[name] for name in others)
        while others and taken > most_bytes - self._layout.logs_bytes:
            name = others.pop()
            self._disk.remove(name)
            taken -= sizes[name]
