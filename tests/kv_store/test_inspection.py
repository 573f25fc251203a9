"""The contract of kv_store.inspection.InspectedTier, over all tiers; and that a look changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kv_store.disk.disk_tier import DiskTier
from kv_store.host_tier import HostTier
from kv_store.inspection import InspectedTier
from kv_store.lru import Lru
from kv_store.redis_inspection import RedisInspection
from kv_store.redis_tier import RedisTier
from kv_store.tier import PageTier, TierFailed
from kv_store.tier_index import TierIndex
from tests.kv_store.chains import SMALL, bytes_of, key_of, page_of
from tests.kv_store.test_tier_contract import INDEXED, OPENERS, ids, read, write

ABSENT = key_of(99)


def inspected(tier: PageTier) -> InspectedTier:
    if isinstance(tier, RedisTier):
        return RedisInspection(tier)
    assert isinstance(tier, HostTier | DiskTier)
    return tier


@contextmanager
def opened(name: str, folder: Path) -> Iterator[PageTier]:
    with OPENERS[name](folder, lambda change, pages: None) as tier:
        yield tier


@pytest.fixture(params=OPENERS)
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PageTier]:
    with opened(request.param, tmp_path) as each:
        yield each


@pytest.fixture(params=INDEXED)
def indexed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PageTier]:
    with opened(request.param, tmp_path) as each:
        yield each


def test_all_pages_have_a_key_and_a_row(tier: PageTier) -> None:
    write(tier, range(6))
    view = inspected(tier)
    assert sorted(view.keys()) == sorted(key_of(number) for number in range(6))
    rows = view.rows((), 100)
    assert {row.id.key: row.id.fingerprint for row in rows} == {
        page_of(number).id.key: page_of(number).id.fingerprint for number in range(6)
    }
    assert all(row.size_bytes >= SMALL.size_bytes for row in rows)
    assert all(0 <= row.age_s < 600 for row in rows)
    assert all((row.refs, row.held_s) == (0, 0.0) for row in rows)


def test_rows_are_bounded_and_can_be_asked_for_by_key(tier: PageTier) -> None:
    write(tier, range(6))
    view = inspected(tier)
    assert len(view.rows((), 4)) == 4
    assert [row.id.key for row in view.rows([ABSENT, key_of(3)], 10)] == [key_of(3)]
    assert len(view.rows([key_of(number) for number in range(6)], 2)) == 2


def test_parents_are_told_where_there_is_an_index(indexed: PageTier) -> None:
    write(indexed, range(4))
    rows = inspected(indexed).rows((), 100)
    assert {row.id.key: row.parent for row in rows} == {page_of(n).id.key: page_of(n).parent for n in range(4)}


def test_the_occupancy_grows_with_what_is_stored(indexed: PageTier) -> None:
    view = inspected(indexed)
    assert (view.occupancy().used_bytes, view.occupancy().pages) == (0, 0)
    write(indexed, range(3))
    occupancy = view.occupancy()
    assert occupancy.pages == 3
    assert 3 * SMALL.size_bytes <= occupancy.used_bytes <= occupancy.capacity_bytes


def test_the_occupancy_of_redis_is_that_of_the_whole_server(tmp_path: Path) -> None:
    with opened("redis", tmp_path) as tier:
        occupancy = inspected(tier).occupancy()
        assert occupancy.pages is None
        assert occupancy.used_bytes > 0


def test_good_and_absent_pages_are_told_apart_and_nothing_is_a_hit(tier: PageTier) -> None:
    write(tier, [0])
    view = inspected(tier)
    before = (tier.counters.hits, tier.counters.misses, tier.counters.bytes_out)
    assert view.check(key_of(0)) == "good"
    assert view.check(ABSENT) == "absent"
    assert (tier.counters.hits, tier.counters.misses, tier.counters.bytes_out) == before
    assert read(tier, [0]) == 1


def test_a_looked_at_page_is_still_the_next_to_be_evicted(indexed: PageTier) -> None:
    write(indexed, range(0, 96, 4))  # single pages, more than there is room for
    view = inspected(indexed)
    oldest = max(view.rows((), 100), key=lambda row: row.age_s).id.key
    assert view.check(oldest) == "good"
    write(indexed, [100])
    assert view.check(oldest) == "absent"


def test_a_held_page_stays_and_says_for_how_long(indexed: PageTier) -> None:
    write(indexed, [0])
    view = inspected(indexed)
    assert view.hold(key_of(0), 500.0)
    assert not view.hold(ABSENT, 500.0)
    write(indexed, range(100, 260, 4))
    (row,) = view.rows([key_of(0)], 1)
    assert 0 < row.held_s <= 500.0
    assert view.hold(key_of(0), 0.0)
    write(indexed, range(300, 460, 4))
    assert view.rows([key_of(0)], 1) == []


def test_a_damaged_value_in_redis_is_found_and_dropped(tmp_path: Path) -> None:
    with opened("redis", tmp_path) as tier:
        assert isinstance(tier, RedisTier)
        write(tier, [0, 1])
        name = tier.prefix + key_of(0).hex()
        value = bytearray(tier.link.operate(lambda redis: redis.get(name)))  # type: ignore[arg-type]
        value[-1] ^= 1
        tier.link.operate(lambda redis: redis.set(name, bytes(value)))
        view = RedisInspection(tier)
        assert [view.check(key_of(number)) for number in (0, 1, 0)] == ["bad", "good", "absent"]
        assert tier.counters.verify_failures == {"checksum": 1}


def test_foreign_names_and_values_in_redis_are_no_pages(tmp_path: Path) -> None:
    with opened("redis", tmp_path) as tier:
        assert isinstance(tier, RedisTier)
        write(tier, [0])
        prefix = tier.prefix
        tier.link.operate(lambda redis: redis.mset({f"{prefix}nothex": b"x", f"{prefix}{'ab' * 32}": b"short"}))
        tier.link.operate(lambda redis: redis.lpush(f"{prefix}{'cd' * 32}", b"x"))
        assert [row.id.key for row in RedisInspection(tier).rows((), 10)] == [key_of(0)]


def test_a_damaged_page_on_disk_is_found_dropped_and_counted(tmp_path: Path) -> None:
    with opened("disk", tmp_path) as tier:
        write(tier, range(3))
        for segment in (path for path in tmp_path.rglob("segment-*")):
            data = bytearray(segment.read_bytes())
            first = data.find(bytes_of(0).tobytes())
            assert first > 0
            data[first + 17] ^= 8
            segment.write_bytes(data)
        view = inspected(tier)
        assert [view.check(key_of(number)) for number in (0, 1, 2, 0)] == ["bad", "good", "good", "absent"]
        assert tier.counters.verify_failures == {"checksum": 1}


def test_a_closed_redis_tier_says_so(tmp_path: Path) -> None:
    with opened("redis", tmp_path) as tier:
        view = inspected(tier)
        tier.close()
        with pytest.raises(TierFailed):
            view.keys()


def test_a_reader_of_an_old_bad_copy_does_not_drop_the_good_one_stored_since() -> None:
    tier = HostTier(SMALL, TierIndex(4 * SMALL.size_bytes, Lru(), 1000.0), lambda change, pages: None)
    write(tier, [0])
    (entry,) = tier.entries()
    tier._contents[entry.place, 0, 0] ^= 1
    compares, replaced = threading.Event(), threading.Event()
    good = tier._good

    def paused(entries: object) -> int:
        compares.set()
        assert replaced.wait(20.0)
        return good(entries)  # type: ignore[arg-type]

    tier._good = paused  # type: ignore[method-assign]
    reader = threading.Thread(target=tier.read, args=(ids([0]), [SMALL.empty()]), daemon=True)
    reader.start()
    assert compares.wait(20.0)
    assert tier.remove([key_of(0)]) == 1
    assert write(tier, [0]) == 1
    replaced.set()
    reader.join(20.0)
    assert not reader.is_alive()
    tier._good = good  # type: ignore[method-assign]
    assert read(tier, [0]) == 1
    assert tier.counters.verify_failures == {"checksum": 1}
