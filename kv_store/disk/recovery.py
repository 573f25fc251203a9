"""Owns the restart: what the directory holds, from the index log where it knows and from the records themselves where it does not.

A page that the log names is taken at its word: the line was written after the record was synced, and every read verifies. What the
log does not name may be torn, so there the payload is read and hashed too. What is found is then exactly what can be read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from kv_store.disk.device import Disk
from kv_store.disk.index_log import Gone, Line, SegmentKnown, Stored
from kv_store.disk.layout import Layout
from kv_store.disk.segment_log import SegmentLog
from kv_store.tier import VerifyFailure


@dataclass(slots=True)
class Recovered:
    """segments: (number, first sequence, slots in use), by first sequence. pages: oldest first. sequence: the highest seen.
    failures: segments and pages that cannot be what they should be. lost: pages that the log names in files that are gone.
    log_is_exact: the log says all of this and nothing else."""

    segments: list[tuple[int, int, int]] = field(default_factory=list)
    pages: list[Stored] = field(default_factory=list)
    sequence: int = 0
    failures: Counter[VerifyFailure] = field(default_factory=Counter)
    lost: list[Stored] = field(default_factory=list)
    log_is_exact: bool = True


@dataclass(slots=True)
class _Found:
    """A segment's file. readable_slots: the file is long enough for so many."""

    first_sequence: int
    readable_slots: int
    known_slots: int = 0
    pages: dict[int, Stored] = field(default_factory=dict)  # by place


def recover(disk: Disk, log: SegmentLog, layout: Layout, lines: Iterable[Line]) -> Recovered:
    """Removes files that are no segments of this layout. Raises OSError."""
    result = Recovered()
    segments = _segments(disk, log, layout, result)
    _replay(segments, layout, lines, result)
    for number, segment in segments.items():
        for slot in range(segment.known_slots, segment.readable_slots):
            place = number * layout.slots + slot
            record = log.find(place, segment.first_sequence)
            if record is not None:
                segment.pages[place] = Stored(place, record.sequence, record.stored_s, record.page)
                result.log_is_exact = False
    _settle(segments, layout, result)
    return result


def _segments(disk: Disk, log: SegmentLog, layout: Layout, result: Recovered) -> dict[int, _Found]:
    numbers = {log.name(number): number for number in range(layout.segments)}
    found: dict[int, _Found] = {}
    for name, size_bytes in sorted(disk.sizes().items()):
        if not name.startswith(f"{log.folder}/segment-"):
            continue
        if name not in numbers:
            disk.remove(name)
            result.log_is_exact = False
            continue
        first = log.first_sequence(numbers[name])
        if isinstance(first, int):
            slots = min(layout.slots, (size_bytes - layout.offset(0)) // layout.record_bytes)
            found[numbers[name]] = _Found(first, slots)
            continue
        if first is not None:
            result.failures[first] += 1
        log.remove(numbers[name])
    return found


def _replay(segments: dict[int, _Found], layout: Layout, lines: Iterable[Line], result: Recovered) -> None:
    """Lines of an earlier use of a segment say nothing, except that their pages left the places where they were before. Pages in
    a file that is gone are put down as in one of no length."""
    gone = _Found(first_sequence=0, readable_slots=0)
    places: dict[bytes, int] = {}  # by key, the last one
    for line in lines:
        match line:
            case SegmentKnown():
                segment = segments.get(line.number, gone)
                if segment.first_sequence == line.first_sequence:
                    segment.known_slots = max(segment.known_slots, line.slots)
            case Gone():
                segments.get(layout.segment_of(line.place), gone).pages.pop(line.place, None)
            case Stored():
                result.sequence = max(result.sequence, line.sequence)
                _leave(places.get(line.page.id.key), line, segments, layout)
                places[line.page.id.key] = line.place
                segment = segments.get(layout.segment_of(line.place), gone)
                if line.sequence >= segment.first_sequence:
                    segment.known_slots = max(segment.known_slots, layout.slot_of(line.place) + 1)
                    segment.pages[line.place] = line
    result.lost = [*gone.pages.values()]


def _leave(place: int | None, line: Stored, segments: dict[int, _Found], layout: Layout) -> None:
    """The page of `line` is not at `place` any more."""
    segment = segments.get(layout.segment_of(place)) if place is not None else None
    if segment is not None and place is not None:
        there = segment.pages.get(place)
        if there is not None and there.page.id.key == line.page.id.key:
            del segment.pages[place]


def _settle(segments: dict[int, _Found], layout: Layout, result: Recovered) -> None:
    """One place per page, the one written last; none behind the end of a file."""
    newest: dict[bytes, Stored] = {}
    lost, found = list(result.lost), 0
    for number, segment in segments.items():
        readable = number * layout.slots + segment.readable_slots
        for stored in segment.pages.values():
            found += 1
            if stored.place >= readable:
                lost.append(stored)
            elif stored.sequence > (rival.sequence if (rival := newest.get(stored.page.id.key)) else 0):
                newest[stored.page.id.key] = stored
    result.failures["length"] += sum(stored.page.id.key not in newest for stored in lost)
    result.log_is_exact &= len(newest) == found and not lost
    result.pages = sorted(newest.values(), key=lambda stored: (stored.stored_s, stored.sequence))
    result.sequence = max([result.sequence, *(stored.sequence for stored in result.pages)])
    for number, segment in segments.items():
        result.sequence = max(result.sequence, segment.first_sequence)
        last = max((layout.slot_of(place) + 1 for place in segment.pages), default=0)
        used = max(segment.known_slots, last)
        whole = segment.readable_slots == layout.slots
        result.segments.append((number, segment.first_sequence, used if whole else layout.slots))
    result.segments.sort(key=lambda item: item[1])
