"""Owns the writer's side of the disk tier's ledger: the place of a page that comes in, segments to begin and to empty, moves. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kv_store.disk.index_log import Line
from kv_store.disk.ledger import Ledger, Pinned
from kv_store.disk.recovery import Recovered
from kv_store.disk.segment_table import Resident
from kv_store.page import Page
from kv_store.tier_index import Entry


@dataclass(frozen=True, slots=True)
class Move:
    """A copy of `entry`, as it was at `source`, is at `target`."""

    entry: Entry
    source: int
    target: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Begun:
    """Of pages that are to be stored, the first `seen`. residents: those that came in, by their ordinals. The others were here already
    or may not come in. The page after them, if there is one, may come in, but there is no place for it."""

    seen: int
    residents: Sequence[tuple[int, Resident]]


class Places:
    """Thread-safe."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._index = ledger.index
        self._table = ledger.table
        self._record_bytes = ledger.layout.record_bytes
        self._lock = ledger.lock

    def restore(self, found: Recovered, now_s: float) -> None:
        """Takes over what was found, and evicts what is too much by now."""
        with self._lock:
            self._ledger.restore(found, now_s)

    # ---- pages

    def begin_all(self, pages: Sequence[Page], now_s: float) -> Begun:
        """Makes room for pages, and gives them the next places, as long as there are some."""
        residents: list[tuple[int, Resident]] = []
        with self._lock:
            for at, page in enumerate(pages):
                granted, evicted = self._index.make_room(page, self._record_bytes, now_s)
                if evicted:
                    self._ledger.evicted(evicted, now_s)
                if not granted:
                    continue
                place = self._table.take()
                if place is None:
                    return Begun(at, residents)
                residents.append((at, self._begin(page, place, now_s)))
        return Begun(len(pages), residents)

    def take(self) -> int | None:
        with self._lock:
            return self._table.take()

    def begin(self, page: Page, place: int, now_s: float) -> Resident:
        """Of a page that has room."""
        with self._lock:
            return self._begin(page, place, now_s)

    def commit(self, batch: Iterable[Resident]) -> None:
        """Their bytes are on disk."""
        with self._lock:
            for resident in batch:
                self._ledger.stored(resident)

    def abort(self, batch: Iterable[Resident]) -> None:
        with self._lock:
            for resident in batch:
                self._index.abort(resident.entry)
                self._table.vacate(resident.entry.place)
                self._ledger.wasted(resident.entry.place)

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
            return self._ledger.next_sequence()

    def begun(self, number: int, first_sequence: int) -> None:
        with self._lock:
            self._table.begun(number, first_sequence)

    def cheapest(self) -> int | None:
        with self._lock:
            return self._table.cheapest()

    def give_up(self, number: int, now_s: float) -> None:
        """Evicts all that is in a segment, whoever reads it."""
        with self._lock:
            for resident in self._table.pages(number):
                if resident.entry.state == "ready":
                    self._ledger.evict(resident.entry, now_s)

    # ---- moves

    def movable(self, number: int) -> list[Pinned]:
        """What is in a segment and may be moved. Nothing is pinned: `moved` sees what became of it."""
        with self._lock:
            found = self._table.pages(number)
            return [Pinned(each.entry, each.entry.place) for each in found if each.entry.state == "ready"]

    def move(self, page: Pinned) -> Move:
        """To the next place, of which there is one."""
        with self._lock:
            target = self._table.take()
            assert target is not None
            return Move(page.entry, page.place, target, self._ledger.next_sequence())

    def moved(self, moves: Iterable[Move]) -> None:
        """The copies are on disk. A page that left meanwhile stays away."""
        with self._lock:
            for move in moves:
                entry = move.entry
                if entry.state != "ready" or entry.place != move.source:
                    self._ledger.wasted(move.target)
                    continue
                self._table.vacate(move.source)
                entry.place = move.target
                resident = Resident(entry, move.sequence)
                self._table.occupy(move.target, resident)
                self._ledger.placed(resident)

    def not_moved(self, moves: Iterable[Move]) -> None:
        """Their copies may be on disk or not, and do not count."""
        with self._lock:
            for move in moves:
                self._ledger.wasted(move.target)

    def drop_bad(self, bad: Pinned) -> None:
        """What was read at that place is not the page."""
        with self._lock:
            self._ledger.drop_bad(bad)

    # ---- what the index log is told

    def take_lines(self) -> list[Line]:
        with self._lock:
            return self._ledger.take_lines()

    def snapshot(self) -> list[Line]:
        with self._lock:
            return self._ledger.snapshot()

    # ---- parts

    def _begin(self, page: Page, place: int, now_s: float) -> Resident:
        resident = Resident(self._index.begin(page, self._record_bytes, place, now_s), self._ledger.next_sequence())
        self._table.occupy(place, resident)
        return resident
