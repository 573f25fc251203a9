"""Whatever happens to the bytes of a disk tier: nothing wrong is served, it is counted, and what can still be read is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from kv_store.disk.disk_tier import DiskTier
from kv_store.disk.layout import DiskLimits, layout_of
from kv_store.disk.record import Record, pack_header, payload_hash
from kv_store.lru import Lru
from kv_store.page import PageFormat
from kv_store.tier import VerifyFailure
from tests.kv_store.chains import SMALL, bytes_of, key_of, page_of, tokens_of
from tests.kv_store.memory_disk import MemoryDisk

PAGES = 10
LIMITS = DiskLimits(capacity_bytes=275_000, segment_bytes=4096 + 4 * 8192)
LAYOUT = layout_of(SMALL, LIMITS)
FOLDER = SMALL.digest().hex()
INDEX = f"{FOLDER}/index"
HEADER_FIELDS = {
    "magic": 0,
    "version": 8,
    "description's length": 10,
    "format digest": 12,
    "payload length": 28,
    "payload hash": 36,
    "stored time": 52,
    "sequence": 60,
    "key": 68,
    "parent": 100,
    "fingerprint": 132,
    "saving": 140,
    "sizes": 148,
    "unit keys": 154,
    "first token": 218,
    "last token": 345,
    "padding": 3000,
    "checksum": 4095,
}


def segment(number: int) -> str:
    return f"{FOLDER}/segment-{number:04d}"


def opened(disk: MemoryDisk, page_format: PageFormat = SMALL, limits: DiskLimits = LIMITS) -> DiskTier:
    return DiskTier(lambda: disk, page_format, limits, Lru(), lambda change, pages: None, lambda: 1000.0)


def filled(disk: MemoryDisk) -> DiskTier:
    """Pages 0-3 in segment 0, 4-7 in 1, 8-9 in 2."""
    tier = opened(disk)
    assert (
        tier.write([page_of(number) for number in range(PAGES)], [bytes_of(number) for number in range(PAGES)]) == PAGES
    )
    return tier


def readable(tier: DiskTier) -> set[int]:
    """Reads each page by itself; checks bytes and accounting."""
    found = set()
    for number in range(PAGES):
        into = [SMALL.empty()]
        if tier.read([page_of(number).id], into):
            assert (into[0] == bytes_of(number)).all(), "a wrong byte was served"
            found.add(number)
    assert tier.used_bytes() == len(found) * LAYOUT.record_bytes
    return found


def record_offset(number: int) -> int:
    return LAYOUT.offset(number % LAYOUT.slots)


def flip(disk: MemoryDisk, name: str, offset: int) -> None:
    disk.files[name].now[offset] ^= 0x10


# ---- flipped bytes


@pytest.mark.parametrize("offset", HEADER_FIELDS.values(), ids=HEADER_FIELDS)
def test_a_flipped_byte_in_a_header_is_found_by_the_next_read(offset: int) -> None:
    disk = MemoryDisk()
    tier = filled(disk)
    flip(disk, segment(1), record_offset(5) + LAYOUT.padded_bytes + offset)
    assert readable(tier) == set(range(PAGES)) - {5}
    assert tier.counters.verify_failures == {"header": 1}


def test_a_flipped_byte_anywhere_in_a_record_makes_no_wrong_byte() -> None:
    for offset in range(0, LAYOUT.record_bytes, 67):
        disk = MemoryDisk()
        tier = filled(disk)
        flip(disk, segment(1), record_offset(5) + offset)
        in_padding = SMALL.size_bytes <= offset < LAYOUT.padded_bytes
        assert readable(tier) == set(range(PAGES)) - (set() if in_padding else {5})
        assert tier.counters.verify_failures.total() == (0 if in_padding else 1)


def test_a_flipped_byte_between_two_runs_is_found_too() -> None:
    for offset in range(0, LAYOUT.record_bytes, 409):
        for name in (segment(1), INDEX):  # with the index log, and by reading the segments
            disk = MemoryDisk()
            filled(disk).close()
            if name == INDEX:
                disk.remove(INDEX)
            flip(disk, segment(1), record_offset(5) + offset)
            in_padding = SMALL.size_bytes <= offset < LAYOUT.padded_bytes
            assert readable(opened(disk)) == set(range(PAGES)) - (set() if in_padding else {5})


def test_a_flipped_byte_in_a_segments_header_costs_that_segment() -> None:
    for offset in (0, 8, 10, 26, 30, 38, 2000, 4095):
        disk = MemoryDisk()
        filled(disk).close()
        flip(disk, segment(1), offset)
        tier = opened(disk)
        assert readable(tier) == {0, 1, 2, 3, 8, 9}
        assert tier.counters.verify_failures["header"] == 1


def test_a_flipped_byte_in_the_index_log_costs_only_time() -> None:
    disk = MemoryDisk()
    filled(disk).close()
    for offset in range(len(disk.files[INDEX].now)):
        damaged = MemoryDisk(
            {name: replace(content, now=bytearray(content.now)) for name, content in disk.files.items()}
        )
        flip(damaged, INDEX, offset)
        tier = opened(damaged)
        assert tier.present([page_of(number).id for number in range(PAGES)]) == PAGES
        if offset % 16 == 0:
            assert readable(tier) == set(range(PAGES))
            assert readable(opened(damaged)) == set(range(PAGES))


# ---- files


def test_a_truncated_segment_keeps_what_is_before_its_end() -> None:
    for kept in (0, 1, 4095, 4096, 5000, 4096 + 8192, 4096 + 2 * 8192 + 6144, 4096 + 4 * 8192 - 1):
        for with_index in ("index", "segments"):
            disk = MemoryDisk()
            filled(disk).close()
            if with_index == "segments":
                disk.remove(INDEX)
            del disk.files[segment(1)].now[kept:]
            tier = opened(disk)
            whole = max(0, (kept - 4096) // LAYOUT.record_bytes)
            assert readable(tier) == {0, 1, 2, 3, 8, 9} | set(range(4, 4 + whole))
            if with_index == "index":
                assert tier.counters.verify_failures["length"] >= 1


def test_a_segment_that_is_truncated_while_it_is_used_loses_pages_only() -> None:
    disk = MemoryDisk()
    tier = filled(disk)
    del disk.files[segment(1)].now[4096 + 8192 + 100 :]
    assert readable(tier) == {0, 1, 2, 3, 4, 8, 9}
    assert tier.counters.verify_failures == {"length": 3}


def test_a_truncated_index_log_costs_only_time() -> None:
    disk = MemoryDisk()
    filled(disk).close()
    for kept in range(0, len(disk.files[INDEX].now), 37):
        damaged = MemoryDisk(
            {name: replace(content, now=bytearray(content.now)) for name, content in disk.files.items()}
        )
        del damaged.files[INDEX].now[kept:]
        assert readable(opened(damaged)) == set(range(PAGES))


def test_a_missing_segment_is_missed_and_counted() -> None:
    disk = MemoryDisk()
    filled(disk).close()
    disk.remove(segment(0))
    tier = opened(disk)
    assert readable(tier) == set(range(4, PAGES))
    assert tier.counters.verify_failures == {"length": 4}


def test_two_swapped_segments_are_both_refused() -> None:
    disk = MemoryDisk()
    filled(disk).close()
    files = disk.files
    files[segment(0)], files[segment(1)] = files[segment(1)], files[segment(0)]
    tier = opened(disk)
    assert readable(tier) == {8, 9}
    assert tier.counters.verify_failures["identity"] == 2


def test_an_index_log_of_another_directory_makes_no_wrong_byte() -> None:
    other = MemoryDisk()
    tier = opened(other)
    tier.write(
        [page_of(number) for number in reversed(range(PAGES))], [bytes_of(number) for number in reversed(range(PAGES))]
    )
    tier.close()
    disk = MemoryDisk()
    filled(disk).close()
    disk.files[INDEX] = other.files[INDEX]
    tier = opened(disk)
    for number in range(PAGES):
        into = [SMALL.empty()]
        if tier.read([page_of(number).id], into):
            assert (into[0] == bytes_of(number)).all()
    assert tier.counters.verify_failures["identity"] > 0


# ---- a wrong record in the right place


def foreign(**changes: object) -> bytes:
    """A whole record with right checksums, as page 5 would have it but for `changes`."""
    content = bytes_of(77)
    record = Record(
        page_of(5), SMALL.digest(), SMALL.size_bytes, payload_hash([content.reshape(-1).data]), 1000.0, 10**6
    )
    header = bytearray(LAYOUT.header_bytes)
    pack_header(replace(record, **changes), memoryview(header))  # type: ignore[arg-type]
    return content.tobytes().ljust(LAYOUT.padded_bytes, b"\0") + header


WRONG: dict[str, tuple[Callable[[], bytes], VerifyFailure]] = {
    "another model": (lambda: foreign(format_digest=b"\x07" * 16), "identity"),
    "another position": (lambda: foreign(page=page_of(6)), "identity"),
    "another tenant": (
        lambda: foreign(page=replace(page_of(5), id=replace(page_of(5).id, key=key_of(555)), tenant=b"t" * 16)),
        "identity",
    ),
    "the same key by collision": (
        lambda: foreign(page=replace(page_of(5), id=replace(page_of(5).id, fingerprint=4711))),
        "fingerprint",
    ),
    "the same key and fingerprint by collision": (
        lambda: foreign(page=replace(page_of(5), id=replace(page_of(5).id, tokens=tokens_of(6)))),
        "fingerprint",
    ),
    "another length": (lambda: foreign(payload_bytes=SMALL.size_bytes - 16), "length"),
    "another version's bytes": (lambda: foreign(payload_hash=b"\x01" * 16), "checksum"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_record_that_is_whole_but_another_is_refused(name: str) -> None:
    make, failure = WRONG[name]
    disk = MemoryDisk()
    tier = filled(disk)
    start = record_offset(5)
    disk.files[segment(1)].now[start : start + LAYOUT.record_bytes] = make()
    assert readable(tier) == set(range(PAGES)) - {5}
    assert tier.counters.verify_failures == {failure: 1}


def test_two_swapped_records_are_both_refused() -> None:
    disk = MemoryDisk()
    tier = filled(disk)
    first, second = disk.files[segment(0)].now, disk.files[segment(1)].now
    size_bytes = LAYOUT.record_bytes
    first[4096 : 4096 + size_bytes], second[4096 : 4096 + size_bytes] = (
        second[4096 : 4096 + size_bytes],
        first[4096 : 4096 + size_bytes],
    )
    assert readable(tier) == set(range(PAGES)) - {0, 4}
    assert tier.counters.verify_failures == {"identity": 2}


def test_the_place_of_a_bad_page_stays_out_of_use_until_its_segment_is_begun_again() -> None:
    disk = MemoryDisk()
    tier = filled(disk)
    flip(disk, segment(2), record_offset(8) + 500)
    before = bytes(disk.files[segment(2)].now[record_offset(8) : record_offset(9)])
    assert 8 not in readable(tier)
    tier.write([page_of(8), page_of(20)], [bytes_of(8), bytes_of(20)])
    assert bytes(disk.files[segment(2)].now[record_offset(8) : record_offset(9)]) == before
    assert readable_after(disk) == {*range(PAGES), 20}


def readable_after(disk: MemoryDisk) -> set[int]:
    tier = opened(disk)
    return {number for number in range(30) if tier.present([page_of(number).id])}


def test_compaction_copies_no_bad_page() -> None:
    disk = MemoryDisk()
    tier = filled(disk)
    flip(disk, segment(0), record_offset(1) + 500)
    for number in range(20, 200):
        tier.write([page_of(number)], [bytes_of(number)])
        tier.read([page_of(2).id, page_of(0).id], [SMALL.empty(), SMALL.empty()])
    assert tier.pages_moved > 0
    for number in range(200):
        into = [SMALL.empty()]
        if tier.read([page_of(number).id], into):
            assert (into[0] == bytes_of(number)).all()
    assert tier.counters.verify_failures == {"checksum": 1}


# ---- formats


def test_pages_of_another_format_are_not_found_and_are_there_again_when_it_returns() -> None:
    disk = MemoryDisk()
    filled(disk).close()
    other = opened(disk, replace(SMALL, identity=b"\x33" * 32))
    assert other.present([page_of(0).id]) == 0
    other.write([page_of(0)], [bytes_of(50)])
    other.close()
    assert readable(opened(disk)) == set(range(PAGES))


def test_pages_of_another_format_leave_before_the_directory_grows_beyond_its_capacity() -> None:
    disk = MemoryDisk()
    filled(disk).close()
    other = opened(disk, replace(SMALL, identity=b"\x33" * 32))
    for number in range(40):
        other.write([page_of(number)], [bytes_of(number)])
    assert disk.peak_bytes <= LIMITS.capacity_bytes
    assert not any(name.startswith(f"{FOLDER}/segment") for name in disk.files)


def test_a_smaller_capacity_evicts_the_rest_and_frees_the_disk() -> None:
    disk = MemoryDisk()
    filled(disk).close()
    smaller = DiskLimits(capacity_bytes=100_000, segment_bytes=LIMITS.segment_bytes)
    tier = opened(disk, SMALL, smaller)
    assert sum(disk.sizes().values()) <= smaller.capacity_bytes
    assert tier.used_bytes() <= layout_of(SMALL, smaller).records * LAYOUT.record_bytes
    assert tier.write([page_of(20)], [bytes_of(20)]) == 1


def test_pages_expire_by_the_time_they_were_stored_at_across_restarts() -> None:
    disk, now_s = MemoryDisk(), [1000.0]
    limits = replace(LIMITS, ttl_s=100.0)

    def at_time() -> DiskTier:
        return DiskTier(lambda: disk, SMALL, limits, Lru(), lambda change, pages: None, lambda: now_s[0])

    tier = at_time()
    tier.write([page_of(0)], [bytes_of(0)])
    now_s[0] = 1060.0
    tier.write([page_of(4)], [bytes_of(4)])
    tier.close()
    now_s[0] = 1110.0
    tier = at_time()
    assert (tier.present([page_of(0).id]), tier.present([page_of(4).id])) == (0, 1)
    assert (tier.counters.expired, tier.used_bytes()) == (1, LAYOUT.record_bytes)
    now_s[0] = 1161.0
    tier.expire()
    assert tier.used_bytes() == 0
