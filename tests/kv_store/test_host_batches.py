"""Many pages in one call of the host tier: they leave behind what single calls would, and the listener hears of them together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from kv_store.host_tier import HostTier
from kv_store.lru import Lru
from kv_store.page import Page, PageBytes
from kv_store.tier import Change
from kv_store.tier_index import TierIndex
from tests.kv_store.chains import SMALL, bytes_of, key_of, page_of

TTL_S = 1000.0


@dataclass(slots=True)
class Told:
    calls: list[tuple[Change, list[bytes]]] = field(default_factory=list)

    def __call__(self, change: Change, pages: Sequence[Page]) -> None:
        self.calls.append((change, [page.id.key for page in pages]))

    def keys(self, change: Change) -> list[bytes]:
        return [key for told, keys in self.calls if told == change for key in keys]


def open_tier(slots: int, told: Told, tenant_bytes: int = 0) -> HostTier:
    return HostTier(SMALL, TierIndex(slots * SMALL.size_bytes, Lru(), TTL_S, tenant_bytes), told, clock=lambda: 5.0)


def unchained(number: int) -> Page:
    return replace(page_of(number), parent=b"")


def write(tier: HostTier, pages: Sequence[Page]) -> int:
    return tier.write(pages, [content_of(page) for page in pages])


def content_of(page: Page) -> PageBytes:
    return bytes_of(page.id.fingerprint)


def test_the_listener_is_told_once_of_what_comes_in_and_once_of_what_leaves_for_it() -> None:
    told = Told()
    tier = open_tier(24, told)
    write(tier, [page_of(number) for number in range(20)])
    assert told.calls == [("stored", [key_of(number) for number in range(20)])]
    told.calls.clear()
    write(tier, [unchained(number) for number in range(100, 110)])
    assert [change for change, _ in told.calls] == ["evicted", "stored"]
    assert [len(keys) for _, keys in told.calls] == [6, 10]


def test_pages_of_one_call_give_way_to_later_ones_of_it() -> None:
    told = Told()
    tier = open_tier(4, told)
    pages = [unchained(number) for number in range(10)]
    assert write(tier, pages) == 10
    assert told.keys("stored") == [page.id.key for page in pages]
    assert told.keys("evicted") == [page.id.key for page in pages[:6]]
    assert (tier.counters.stored, tier.counters.evicted, tier.counters.dropped) == (10, 6, 0)
    into = [SMALL.empty() for _ in range(4)]
    assert tier.read([page.id for page in pages[6:]], into) == 4
    assert all((found == content_of(page)).all() for found, page in zip(into, pages[6:], strict=True))


def test_a_page_that_comes_twice_in_one_call_is_stored_once_and_here_twice() -> None:
    told = Told()
    tier = open_tier(8, told)
    assert write(tier, [page_of(0), page_of(1), page_of(0)]) == 3
    assert told.keys("stored") == [key_of(0), key_of(1)]
    assert tier.counters.dropped == 0


def test_another_page_under_a_key_of_the_same_call_is_dropped_and_counted_once() -> None:
    tier = open_tier(8, Told())
    other = replace(page_of(0), id=replace(page_of(0).id, fingerprint=99))
    assert write(tier, [page_of(0), page_of(1), other, page_of(2)]) == 3
    assert tier.counters.dropped == 1
    assert tier.counters.verify_failures["fingerprint"] == 1


@pytest.mark.parametrize("tenant_bytes", [0, 5 * SMALL.size_bytes])
@pytest.mark.parametrize("seed", range(8))
def test_one_call_leaves_what_a_call_per_page_leaves(seed: int, tenant_bytes: int) -> None:
    rng = random.Random(seed)
    pages = [page_of(rng.randrange(80), rng.choice([b"", b"t"]) if tenant_bytes else b"") for _ in range(300)]
    together, singly = Told(), Told()
    one, other = open_tier(12, together, tenant_bytes), open_tier(12, singly, tenant_bytes)
    for start in range(0, len(pages), 75):
        some = pages[start : start + 75]
        assert write(one, some) == sum(write(other, [page]) for page in some)
    assert set(one.keys()) == set(other.keys())
    assert together.keys("stored") == singly.keys("stored")
    assert together.keys("evicted") == singly.keys("evicted")
    assert one.counters.dropped == other.counters.dropped


def test_after_an_error_none_of_the_batch_is_here_and_its_room_is_free() -> None:
    told = Told()
    tier = open_tier(4, told)
    wrong: PageBytes = np.zeros((SMALL.layers, 7), dtype=np.uint8)
    with pytest.raises(ValueError, match="broadcast"):
        tier.write([page_of(0), page_of(1)], [bytes_of(0), wrong])
    assert (told.calls, tier.used_bytes(), tier.keys()) == ([], 0, [])
    assert write(tier, [page_of(number) for number in range(4)]) == 4


def test_what_is_borrowed_each_by_itself_lacks_only_what_is_absent_or_bad() -> None:
    told = Told()
    tier = open_tier(8, told)
    pages = [page_of(number) for number in range(4)]
    write(tier, pages)
    tier.remove([key_of(1)])
    with tier.borrowed([pages[2].id]) as (third,):
        third[0, 0] ^= 1
    with tier.borrowed_each([page.id for page in pages]) as borrowed:
        assert [content is not None for content in borrowed] == [True, False, False, True]
        assert tier.remove([key_of(3)]) == 1
        assert borrowed[3] is not None
        assert (borrowed[3] == content_of(pages[3])).all()
    assert tier.counters.verify_failures["checksum"] == 1
    assert tier.keys() == [key_of(0)]
    assert tier.used_bytes() == SMALL.size_bytes
