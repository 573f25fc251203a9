from __future__ import annotations

from kv_store.disk.layout import DiskLimits, layout_of
from kv_store.disk.segment_table import Resident, SegmentTable
from kv_store.tier_index import Entry
from tests.kv_store.chains import SMALL, page_of

LAYOUT = layout_of(SMALL, DiskLimits(capacity_bytes=180_000, segment_bytes=4096 + 3 * 8192))


def full_segment() -> SegmentTable:
    """Segment 0 holds three pages and no more."""
    table = SegmentTable(LAYOUT)
    table.begun(0, 1)
    for number in range(LAYOUT.slots):
        place = table.take()
        assert place == number
        table.occupy(place, Resident(Entry(page_of(number), 8192, place, 0.0, 1.0, "ready"), number + 1))
    return table


def test_a_segment_is_vacant_once_all_its_pages_are_gone() -> None:
    table = full_segment()
    assert table.take() is None
    for place in range(LAYOUT.slots):
        assert 0 not in table.vacant()
        table.vacate(place)
    assert table.vacant()[0] == 0


def test_a_segment_that_is_read_is_not_vacant_and_not_compacted() -> None:
    table = full_segment()
    table.begun(1, 10)
    assert table.cheapest() == 0
    table.reading(1)
    assert table.cheapest() is None
    for place in range(LAYOUT.slots):
        table.vacate(place)
    assert 0 not in table.vacant()
    table.done_reading(1)
    assert 0 in table.vacant()


def test_a_segment_that_is_written_to_is_not_compacted() -> None:
    table = full_segment()
    table.begun(1, 10)
    table.pages(0)[0].entry.state = "writing"
    assert table.cheapest() is None
