"""Owns which slots of which segments are in use, where the next record goes, and which segment can be used anew. Pure.

A place is given out once per use of its segment, in order; it is occupied while a page is there, and dead after that. A segment
without occupied places that nobody reads is vacant: it may be used from its beginning again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kv_store.disk.layout import Layout
from kv_store.tier_index import Entry


@dataclass(slots=True)
class Resident:
    entry: Entry
    sequence: int


@dataclass(slots=True)
class _Segment:
    """given: slots given out. known: slots, from the first on, about which the index log says everything."""

    first_sequence: int = 0
    given: int = 0
    known: int = 0
    occupied: int = 0
    readers: int = 0


class SegmentTable:
    """Not thread-safe: its owner holds a lock."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._segments: dict[int, _Segment] = {}  # those that have a file
        self._residents: dict[int, Resident] = {}  # by place
        self._open: int | None = None

    # ---- segments

    @property
    def files(self) -> int:
        return len(self._segments)

    def vacant(self) -> list[int]:
        """Numbers of segments that may be begun; those that have a file first."""
        old = [number for number, segment in self._segments.items() if self._is_vacant(number, segment)]
        new = [number for number in range(self._layout.segments) if number not in self._segments]
        return old + new

    def has_file(self, number: int) -> bool:
        return number in self._segments

    def begun(self, number: int, first_sequence: int) -> None:
        """The next places are in this segment, from its first slot on."""
        assert number not in self._segments or self._is_vacant(number, self._segments[number])
        self._segments[number] = _Segment(first_sequence)
        self._open = number

    def restored(self, number: int, first_sequence: int, used_slots: int) -> None:
        """A file that was there at the start. Call it for the segments in order of their first sequence: the last one is open."""
        self._segments[number] = _Segment(first_sequence, used_slots, used_slots)
        self._open = number

    def cheapest(self) -> int | None:
        """The full segment with the fewest pages that nobody reads or writes; None without one."""
        writing = {
            self._layout.segment_of(place)
            for place, resident in self._residents.items()
            if resident.entry.state != "ready"
        }
        candidates = [
            (segment.occupied, number)
            for number, segment in self._segments.items()
            if number != self._open and number not in writing and segment.occupied and not segment.readers
        ]
        return min(candidates)[1] if candidates else None

    def pages(self, number: int) -> list[Resident]:
        first = number * self._layout.slots
        found = (self._residents.get(place) for place in range(first, first + self._layout.slots))
        return [resident for resident in found if resident is not None]

    def known(self) -> Iterator[tuple[int, int, int]]:
        """(number, first sequence, slots known) of every segment."""
        for number, segment in self._segments.items():
            yield number, segment.first_sequence, segment.known

    # ---- places

    def take(self) -> int | None:
        """The next place; None where the open segment is full."""
        if self._open is None or self._segments[self._open].given == self._layout.slots:
            return None
        segment = self._segments[self._open]
        segment.given += 1
        return self._open * self._layout.slots + segment.given - 1

    def occupy(self, place: int, resident: Resident) -> None:
        assert place not in self._residents
        self._residents[place] = resident
        self._segment(place).occupied += 1

    def vacate(self, place: int) -> None:
        del self._residents[place]
        self._segment(place).occupied -= 1

    def logged(self, place: int) -> tuple[int, int, int]:
        """The index log has, or will have next, a line for `place` and for all that count before it in its segment. Returns
        what `known` says of the segment."""
        number = self._layout.segment_of(place)
        segment = self._segments[number]
        segment.known = max(segment.known, self._layout.slot_of(place) + 1)
        return number, segment.first_sequence, segment.known

    def residents(self) -> Iterator[tuple[int, Resident]]:
        return iter(self._residents.items())

    def reading(self, place: int) -> None:
        self._segment(place).readers += 1

    def done_reading(self, place: int) -> None:
        self._segment(place).readers -= 1

    # ---- parts

    def _segment(self, place: int) -> _Segment:
        return self._segments[self._layout.segment_of(place)]

    def _is_vacant(self, number: int, segment: _Segment) -> bool:
        """The open one is vacant too once it is full and all its pages are gone."""
        in_use = number == self._open and segment.given < self._layout.slots
        return not (in_use or segment.occupied or segment.readers)
