"""What counts as a use of a page: that a request reads it, not that it is copied to the tiers below."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

import pytest

from kv_store.host_tier import HostTier
from kv_store.page import Page, PageId
from kv_store.policies import POLICIES, policy_of
from kv_store.tier_index import TierIndex
from kv_store.tiered_store import TieredStore
from tests.kv_store.chains import SMALL, bytes_of, page_of
from tests.kv_store.test_tiered_store import Shelf

SLOTS, FIRST, LATER = 4, range(4), range(4, 7)
QUOTAS = {"no quota": 0, "a quota of all": SLOTS * SMALL.size_bytes}
DEADLINE_S = 20.0


@pytest.fixture(params=QUOTAS)
def tenant_bytes(request: pytest.FixtureRequest) -> int:
    return QUOTAS[request.param]


@pytest.fixture(params=POLICIES)
def host(request: pytest.FixtureRequest, tenant_bytes: int) -> HostTier:
    """Full of pages that came one after the other."""
    tier = host_of(request.param, tenant_bytes)
    write(tier, FIRST)
    return tier


def host_of(policy: str, tenant_bytes: int = 0) -> HostTier:
    make = policy_of(policy)
    index = TierIndex(SLOTS * SMALL.size_bytes, make(), 1000.0, tenant_bytes, make)
    return HostTier(SMALL, index, lambda change, pages: None, clock=lambda: 5.0)


def alone(number: int) -> Page:
    """Of a prompt of one page, worth as much as any other."""
    return replace(page_of(number, b"tenant"), parent=b"", saving_s=0.0)


def ids(numbers: Iterable[int]) -> list[PageId]:
    return [alone(number).id for number in numbers]


def write(tier: HostTier, numbers: Iterable[int]) -> None:
    for number in numbers:
        assert tier.write([alone(number)], [bytes_of(number)]) == 1


def left(tier: HostTier) -> list[int]:
    return [number for number in FIRST if tier.present(ids([number]))]


def test_pages_that_were_copied_down_leave_as_if_they_had_not_been(host: HostTier) -> None:
    with host.borrowed_each(ids([1, 0, 99])) as borrowed:
        assert [content is not None for content in borrowed] == [True, True, False]
    write(host, [4, 5])
    assert left(host) == [2, 3]


def test_a_page_that_was_copied_down_leaves_before_one_that_was_read(host: HostTier) -> None:
    assert host.read(ids([0]), [SMALL.empty()]) == 1
    with host.borrowed_each(ids(FIRST)):
        pass
    write(host, LATER)
    assert left(host) == [0]


def test_a_page_does_not_leave_while_it_is_copied_down(host: HostTier) -> None:
    with host.borrowed_each(ids([0])):
        write(host, LATER)
    assert left(host) == [0]


def test_of_what_was_written_to_the_disk_only_what_is_asked_for_again_stays_in_host_memory() -> None:
    tier, disk = host_of("s3-fifo"), Shelf()
    store = TieredStore(tier, [disk], SMALL.size_bytes)

    def save(numbers: Iterable[int]) -> None:
        for number in numbers:
            store.save([alone(number)], [bytes_of(number)])
            assert store.settle(time.monotonic() + DEADLINE_S)

    save(FIRST)
    assert store.load(ids([0]), [SMALL.empty()], float("inf")).by_tier == {"host": 1}
    save(LATER)
    store.close()
    assert sorted(disk.held) == sorted(alone(number).id.key for number in (*FIRST, *LATER))
    assert left(tier) == [0]
