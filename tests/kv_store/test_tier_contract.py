"""The contract of kv_store.tier.PageTier. A tier joins with one line in OPENERS; one that has its medium to itself, and so knows
what is there and how much of it, in INDEXED too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from kv_store.disk.disk_tier import DiskTier
from kv_store.disk.layout import DiskLimits
from kv_store.disk.posix import posix_mount
from kv_store.host_tier import HostTier
from kv_store.lru import Lru
from kv_store.page import Page, PageBytes, PageId
from kv_store.redis_link import RedisSettings
from kv_store.redis_tier import RedisTier
from kv_store.tier import Change, PageTier, TierListener
from kv_store.tier_index import TierIndex
from tests.kv_store.chains import SMALL, bytes_of, key_of, page_of, tokens_of
from tests.kv_store.redis_server import running_redis

PAGES_MOST = 24  # a tier under test holds at least half and at most so many
TTL_S = 1000.0
LONGEST_S = 60.0


@dataclass(slots=True)
class Bench:
    tier: PageTier
    news: list[tuple[Change, bytes]]

    def known(self) -> set[bytes]:
        """What the listener believes to be there."""
        there: set[bytes] = set()
        for change, key in self.news:
            (there.add if change == "stored" else there.discard)(key)
        return there


def open_disk(folder: Path, listener: TierListener) -> PageTier:
    limits = DiskLimits(capacity_bytes=275_000, ttl_s=TTL_S, segment_bytes=4096 + 4 * 8192)
    return DiskTier(posix_mount(folder / "disk"), SMALL, limits, Lru(), listener)


def open_host(folder: Path, listener: TierListener) -> PageTier:
    return HostTier(SMALL, TierIndex(PAGES_MOST * SMALL.size_bytes, Lru(), TTL_S), listener)


@contextmanager
def closing(tier: PageTier) -> Iterator[PageTier]:
    yield tier
    tier.close()


@contextmanager
def open_redis(folder: Path, listener: TierListener) -> Iterator[PageTier]:
    with (
        running_redis(folder) as server,
        closing(RedisTier(RedisSettings(server.url, read_budget_s=60.0), SMALL)) as tier,
    ):
        yield tier


OPENERS: dict[str, Callable[[Path, TierListener], AbstractContextManager[PageTier]]] = {
    "disk": lambda folder, listener: closing(open_disk(folder, listener)),
    "host": lambda folder, listener: closing(open_host(folder, listener)),
    "redis": open_redis,
}
INDEXED = ("disk", "host")


@contextmanager
def open_bench(name: str, folder: Path) -> Iterator[Bench]:
    news: list[tuple[Change, bytes]] = []

    def heard(change: Change, pages: Sequence[Page]) -> None:
        news.extend((change, page.id.key) for page in pages)

    with OPENERS[name](folder, heard) as tier:
        yield Bench(tier, news)


@pytest.fixture(params=OPENERS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    with open_bench(request.param, tmp_path) as opened:
        yield opened


@pytest.fixture(params=INDEXED)
def indexed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    with open_bench(request.param, tmp_path) as opened:
        yield opened


def write(tier: PageTier, numbers: Sequence[int]) -> int:
    return tier.write([page_of(number) for number in numbers], [bytes_of(number) for number in numbers])


def read(tier: PageTier, numbers: Sequence[int]) -> int:
    """How many are there, and that they are what was stored."""
    into = [SMALL.empty() for _ in numbers]
    good = tier.read(ids(numbers), into)
    for number, content in zip(numbers[:good], into, strict=False):
        assert (content == bytes_of(number)).all()
    return good


def ids(numbers: Sequence[int]) -> list[PageId]:
    return [page_of(number).id for number in numbers]


def test_what_was_written_is_read_byte_for_byte(bench: Bench) -> None:
    assert write(bench.tier, range(4)) == 4
    assert bench.tier.present(ids(range(4))) == 4
    assert read(bench.tier, range(4)) == 4


def test_an_empty_tier_has_nothing(bench: Bench) -> None:
    assert bench.tier.present(ids([1, 2])) == 0
    assert read(bench.tier, [1, 2]) == 0
    assert bench.tier.counters.misses == 2


def test_an_empty_tier_uses_nothing(indexed: Bench) -> None:
    assert indexed.tier.used_bytes() == 0


def test_nothing_asked_is_nothing_done(bench: Bench) -> None:
    assert (bench.tier.present([]), bench.tier.read([], []), bench.tier.write([], []), bench.tier.remove([])) == (
        0,
    ) * 4


def test_present_and_read_stop_at_the_first_gap(bench: Bench) -> None:
    write(bench.tier, [0, 1, 3])
    assert bench.tier.present(ids([0, 1, 2, 3])) == 2
    assert read(bench.tier, [0, 1, 2, 3]) == 2
    assert read(bench.tier, [2, 3]) == 0


@pytest.mark.parametrize("other", [{"fingerprint": page_of(0).id.fingerprint ^ 1}, {"tokens": tokens_of(1)}], ids=str)
def test_equal_keys_with_another_fingerprint_or_other_tokens_are_a_miss_and_take_no_place(
    bench: Bench, other: dict[str, int | bytes]
) -> None:
    write(bench.tier, [0])
    twin = replace(page_of(0), id=replace(page_of(0).id, **other))  # type: ignore[arg-type]
    assert bench.tier.present([twin.id]) == 0
    assert bench.tier.read([twin.id], [SMALL.empty()]) == 0
    assert bench.tier.write([twin], [bytes_of(99)]) == 0
    assert read(bench.tier, [0]) == 1


def test_a_page_that_is_there_counts_and_is_not_stored_twice(indexed: Bench) -> None:
    write(indexed.tier, [0, 1])
    used_bytes = indexed.tier.used_bytes()
    assert write(indexed.tier, [0, 1, 2]) == 3
    assert indexed.tier.used_bytes() == used_bytes // 2 * 3
    assert indexed.tier.counters.stored == 3


def test_a_removed_page_is_gone_and_its_bytes_with_it(indexed: Bench) -> None:
    write(indexed.tier, [0, 1, 2])
    assert indexed.tier.remove([key_of(1), key_of(2), key_of(7)]) == 2
    assert indexed.tier.present(ids([0, 1])) == 1
    indexed.tier.remove([key_of(0)])
    assert indexed.tier.used_bytes() == 0
    assert indexed.known() == set()


def test_a_removed_page_can_be_stored_again(bench: Bench) -> None:
    write(bench.tier, [0])
    bench.tier.remove([key_of(0)])
    assert write(bench.tier, [0]) == 1
    assert read(bench.tier, [0]) == 1


def test_the_listener_knows_what_is_there(indexed: Bench) -> None:
    write(indexed.tier, range(3 * PAGES_MOST))
    there = {key_of(number) for number in range(3 * PAGES_MOST) if indexed.tier.present(ids([number]))}
    assert indexed.known() == there
    assert PAGES_MOST // 2 <= len(there) <= PAGES_MOST


def test_a_full_tier_takes_new_pages_in_and_evicts_old_ones(indexed: Bench) -> None:
    for number in range(3 * PAGES_MOST):
        assert write(indexed.tier, [number]) == 1
    counters = indexed.tier.counters
    assert counters.stored == 3 * PAGES_MOST
    assert counters.evicted == counters.stored - len(indexed.known())
    assert read(indexed.tier, [3 * PAGES_MOST - 4, 3 * PAGES_MOST - 3]) == 2


def test_a_chain_loses_its_last_pages_first(indexed: Bench) -> None:
    for number in range(3 * PAGES_MOST):
        write(indexed.tier, [number])
        for first in range(0, number + 1, 4):
            chain = range(first, min(first + 4, number + 1))
            assert indexed.tier.present(ids(chain)) == sum(key_of(each) in indexed.known() for each in chain)


def test_pages_whose_layers_lie_apart_are_stored_and_loaded(bench: Bench) -> None:
    wide: PageBytes = np.zeros((SMALL.layers, 3 * SMALL.block_bytes), dtype=np.uint8)
    middle = wide[:, SMALL.block_bytes : 2 * SMALL.block_bytes]
    middle[:] = bytes_of(0)
    assert bench.tier.write([page_of(0)], [middle]) == 1
    middle[:] = 0
    assert bench.tier.read(ids([0]), [middle]) == 1
    assert (middle == bytes_of(0)).all()
    assert not wide[:, : SMALL.block_bytes].any()
    assert not wide[:, 2 * SMALL.block_bytes :].any()


def test_the_source_may_change_as_soon_as_write_returns(bench: Bench) -> None:
    content = bytes_of(0)
    bench.tier.write([page_of(0)], [content])
    content[:] = 0
    assert read(bench.tier, [0]) == 1


def test_bytes_and_hits_are_counted(bench: Bench) -> None:
    write(bench.tier, [0, 1])
    read(bench.tier, [0, 1, 2])
    counters = bench.tier.counters
    assert (counters.bytes_in, counters.bytes_out) == (2 * SMALL.size_bytes, 2 * SMALL.size_bytes)
    assert (counters.hits, counters.misses) == (2, 1)


def test_readers_beside_a_writer_never_see_a_wrong_byte(indexed: Bench) -> None:
    """Three threads read while one writes far more than fits."""
    expected = [bytes_of(number) for number in range(64)]
    stop = threading.Event()
    wrong: list[int] = []

    def reads(first: int) -> None:
        number = first
        while not stop.is_set():
            into = [SMALL.empty()]
            if indexed.tier.read(ids([number]), into) and not (into[0] == expected[number]).all():
                wrong.append(number)
            number = (number + 1) % 64

    threads = [threading.Thread(target=reads, args=(first,), daemon=True) for first in (0, 20, 40)]
    for thread in threads:
        thread.start()
    try:
        for round_start in range(0, 256, 4):
            write(indexed.tier, [number % 64 for number in range(round_start, round_start + 4)])
    finally:
        stop.set()
        for thread in threads:
            thread.join(LONGEST_S)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert not indexed.tier.counters.verify_failures
    there = {key_of(number) for number in range(64) if indexed.tier.present(ids([number]))}
    assert indexed.known() == there
