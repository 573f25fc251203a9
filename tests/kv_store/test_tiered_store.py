"""The tiers together: the nearest one that has a page gives it, a bad or absent page falls through, saves go down and never block."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from kv_store.host_tier import HostTier
from kv_store.lru import Lru
from kv_store.page import Page, PageBytes, PageFormat, PageId
from kv_store.split import Run
from kv_store.tier import Change, TierCounters, TierFailed
from kv_store.tier_index import TierIndex
from kv_store.tiered_store import TieredStore

FORMAT = PageFormat(bytes(32), 16, 3, 64)
DEADLINE_S = 20.0


def page(number: int, parent: int | None = None) -> Page:
    parent_key = b"" if parent is None else page(parent).id.key
    key = number.to_bytes(32, "little")
    return Page(PageId(key, number * 7, bytes([number]) * FORMAT.token_bytes), parent_key, key)


def content(number: int) -> PageBytes:
    return np.random.default_rng(number).integers(0, 256, (FORMAT.layers, FORMAT.block_bytes), dtype=np.uint8)


def chain(count: int) -> list[Page]:
    return [page(number, number - 1 if number else None) for number in range(count)]


def ids(pages: Sequence[Page]) -> list[PageId]:
    return [each.id for each in pages]


def host_tier(pages: int, news: list[tuple[Change, bytes]] | None = None) -> HostTier:
    def listener(change: Change, changed: Sequence[Page]) -> None:
        if news is not None:
            news.extend((change, each.id.key) for each in changed)

    return HostTier(FORMAT, TierIndex(pages * FORMAT.size_bytes, Lru(), ttl_s=3600.0), listener)


class Shelf:
    """A lower tier in memory that can be told to fail or to be slow."""

    def __init__(self, name: str = "disk") -> None:
        self.name = name
        self.counters = TierCounters()
        self.held: dict[bytes, PageBytes] = {}
        self.tenants: set[bytes] = set()
        self.savings: dict[bytes, float] = {}
        self.written: list[list[bytes]] = []  # of each call
        self.fails = False
        self.before_read: Callable[[], object] = lambda: None
        self.before_look: Callable[[], object] = lambda: None

    def present(self, page_ids: Sequence[PageId]) -> int:
        self.before_look()
        self._check()
        return next((at for at, each in enumerate(page_ids) if each.key not in self.held), len(page_ids))

    def read(self, page_ids: Sequence[PageId], into: Sequence[PageBytes]) -> int:
        self._check()
        self.before_read()
        good = self.present(page_ids)
        for each, target in zip(page_ids[:good], into, strict=False):
            np.copyto(target, self.held[each.key])
        return good

    def write(self, pages: Sequence[Page], contents: Sequence[PageBytes]) -> int:
        self._check()
        self.written.append([each.id.key for each in pages])
        self.tenants |= {each.tenant for each in pages}
        self.savings |= {each.id.key: each.saving_s for each in pages}
        self.held |= {each.id.key: bytes_.copy() for each, bytes_ in zip(pages, contents, strict=True)}
        return len(pages)

    def remove(self, keys: Sequence[bytes]) -> int:
        return sum(self.held.pop(key, None) is not None for key in keys)

    def used_bytes(self) -> int:
        return len(self.held) * FORMAT.size_bytes

    def close(self) -> None: ...

    def _check(self) -> None:
        if self.fails:
            raise TierFailed("this medium is broken, as the test wants it")


class WatchedHost(HostTier):
    """Remembers what its pages are said to save."""

    savings: dict[bytes, float]

    def write(self, pages: Sequence[Page], contents: Sequence[PageBytes]) -> int:
        self.savings = {each.id.key: each.saving_s for each in pages}
        return super().write(pages, contents)


def loaded(store: TieredStore, pages: Sequence[Page], deadline_s: float = float("inf")) -> tuple[int, list[PageBytes]]:
    into = [FORMAT.empty() for _ in pages]
    return store.load(ids(pages), into, deadline_s).good, into


def test_what_was_saved_comes_back_from_the_host_and_after_its_eviction_from_below() -> None:
    shelf, pages = Shelf(), chain(6)
    store = TieredStore(host_tier(4), [shelf], FORMAT.size_bytes)
    for number, each in enumerate(pages):
        store.save([each], [content(number)])
        assert store.settle(time.monotonic() + DEADLINE_S)
    # A chain longer than the host tier: its beginning stays there, everything is below.
    assert store.locate(ids(pages)) == [Run("host", 3), Run("disk", 3)]
    good, into = loaded(store, pages)
    assert good == len(pages)
    assert all(np.array_equal(found, content(number)) for number, found in enumerate(into))
    store.close()


def test_a_page_whose_bytes_changed_in_memory_is_a_miss_and_counted() -> None:
    host, pages = host_tier(4), chain(3)
    store = TieredStore(host, [], FORMAT.size_bytes)
    store.save(pages, [content(number) for number in range(3)])
    with host.borrowed(ids(pages)[1:2]) as (bytes_of_second,):
        bytes_of_second[1, 5] ^= 1
    good, into = loaded(store, pages)
    assert good == 1
    assert np.array_equal(into[0], content(0))
    assert host.counters.verify_failures["checksum"] == 1
    assert store.locate(ids(pages)) == [Run("host", 1)]
    store.close()


def test_a_page_whose_tokens_changed_in_memory_is_not_served_for_the_tokens_that_it_has_now() -> None:
    """The checksum covers them: who asks for the tokens that it was computed from misses it, who asks for the others too."""
    host, pages = host_tier(4), chain(3)
    store = TieredStore(host, [], FORMAT.size_bytes)
    store.save(pages, [content(number) for number in range(3)])
    (entry,) = (entry for entry in host.entries() if entry.page == pages[1])
    entry.page = replace(entry.page, id=replace(entry.page.id, tokens=b"\x07" + entry.page.id.tokens[1:]))
    assert loaded(store, pages)[0] == 1
    assert set(host.counters.verify_failures) == {"fingerprint"}
    assert store.load([entry.page.id], [FORMAT.empty()], float("inf")).good == 0
    assert host.counters.verify_failures["checksum"] == 1
    assert store.locate([entry.page.id]) == []
    store.close()


def test_a_bad_page_of_one_tier_is_taken_from_the_next() -> None:
    host, shelf, pages = host_tier(4), Shelf(), chain(3)
    store = TieredStore(host, [shelf], FORMAT.size_bytes)
    store.save(pages, [content(number) for number in range(3)])
    assert store.settle(time.monotonic() + DEADLINE_S)
    with host.borrowed(ids(pages)[1:2]) as (bytes_of_second,):
        bytes_of_second[:] = 0
    good, into = loaded(store, pages)
    assert good == 3
    assert all(np.array_equal(found, content(number)) for number, found in enumerate(into))
    store.close()


def test_equal_keys_with_other_fingerprints_are_another_page() -> None:
    store = TieredStore(host_tier(4), [], FORMAT.size_bytes)
    store.save([page(1)], [content(1)])
    assert store.locate([replace(page(1).id, fingerprint=99)]) == []
    assert store.load([replace(page(1).id, fingerprint=99)], [FORMAT.empty()], float("inf")).good == 0
    store.close()


def test_a_broken_tier_is_passed_over() -> None:
    broken, shelf, pages = Shelf("broken"), Shelf(), chain(2)
    shelf.write(pages, [content(0), content(1)])
    broken.fails = True
    store = TieredStore(host_tier(4), [broken, shelf], FORMAT.size_bytes)
    assert store.locate(ids(pages)) == [Run("disk", 2)]
    assert loaded(store, pages)[0] == 2
    store.save([page(7)], [content(7)])
    assert store.settle(time.monotonic() + DEADLINE_S)
    assert page(7).id.key in shelf.held
    store.close()


def test_a_load_ends_at_its_deadline_with_what_came_before() -> None:
    now = [0.0]
    shelf, pages = Shelf(), chain(40)
    shelf.write(pages, [content(number) for number in range(40)])
    shelf.before_read = lambda: now.__setitem__(0, now[0] + 1.0)
    store = TieredStore(host_tier(4), [shelf], FORMAT.size_bytes, clock=lambda: now[0])
    report = store.load(ids(pages), [FORMAT.empty() for _ in pages], deadline_s=1.5)
    assert report.late
    assert 0 < report.good < 40
    store.close()


def test_what_a_full_host_tier_evicts_is_told() -> None:
    news: list[tuple[Change, bytes]] = []
    host = host_tier(2, news)
    for number in range(3):
        host.write([page(number)], [content(number)])
    assert news == [
        ("stored", page(0).id.key),
        ("stored", page(1).id.key),
        ("evicted", page(0).id.key),
        ("stored", page(2).id.key),
    ]
    assert host.counters.evicted == 1
    assert host.used_bytes() == 2 * FORMAT.size_bytes


@pytest.mark.parametrize("readers", [1, 3])
def test_a_page_that_is_read_is_not_evicted(readers: int) -> None:
    host = host_tier(readers)
    pages = [page(number) for number in range(readers)]
    host.write(pages, [content(number) for number in range(readers)])
    with host.borrowed(ids(pages)) as contents:
        assert host.write([page(50)], [content(50)]) == 0
        assert all(np.array_equal(found, content(number)) for number, found in enumerate(contents))
    assert host.counters.dropped == 1
    assert host.write([page(50)], [content(50)]) == 1


def test_each_tier_is_told_what_a_hit_in_it_saves_over_the_next_one_and_the_last_over_computing() -> None:
    host = WatchedHost(FORMAT, TierIndex(4 * FORMAT.size_bytes, Lru(), ttl_s=3600.0), lambda change, pages: None)
    disk, redis = Shelf("disk"), Shelf("redis")
    store = TieredStore(host, [disk, redis], FORMAT.size_bytes)
    for name, page_s in (("host", 0.001), ("disk", 0.003), ("redis", 0.010)):
        store.speeds[name].measured(1, page_s)
    shallow, deep = (replace(each, saving_s=each.id.fingerprint / 70) for each in (page(1), page(2)))
    store.save([shallow, deep], [content(1), content(2)])
    assert store.settle(time.monotonic() + DEADLINE_S)
    store.close()
    assert [host.savings[each.id.key] for each in (shallow, deep)] == pytest.approx([0.002, 0.002])
    assert [disk.savings[each.id.key] for each in (shallow, deep)] == pytest.approx([0.007, 0.007])
    assert [redis.savings[each.id.key] for each in (shallow, deep)] == pytest.approx([0.090, 0.190])


def test_a_page_that_the_host_has_no_room_for_is_valued_for_the_tier_that_gets_it() -> None:
    disk, pages = Shelf(), [replace(each, saving_s=0.5) for each in chain(3)]
    store = TieredStore(host_tier(2), [disk], FORMAT.size_bytes)
    store.speeds["disk"].measured(1, 0.2)
    store.save(pages, [content(number) for number in range(3)])
    store.close()
    assert disk.savings[pages[2].id.key] == pytest.approx(0.3)


def test_all_that_the_host_has_no_room_for_goes_straight_to_the_lower_tiers_in_one_call_each() -> None:
    disk, pages = Shelf(), [replace(each, parent=b"") for each in chain(10)]
    store = TieredStore(host_tier(3), [disk], FORMAT.size_bytes)
    store.save(pages, [content(number) for number in range(10)])
    assert store.settle(time.monotonic() + DEADLINE_S)
    store.close()
    assert disk.written[0] == [each.id.key for each in pages[:7]]
    assert sorted(disk.held) == sorted(each.id.key for each in pages)
    assert store.dropped_on_the_way_down == 0
