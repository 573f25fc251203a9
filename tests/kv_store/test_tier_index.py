"""The index of a tier against a naive model, under every eviction policy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kv_store.gdsf import Gdsf
from kv_store.lru import Lru
from kv_store.page import Page, PageId
from kv_store.policies import policy_of
from kv_store.tier_index import Entry, TierIndex

CAPACITY, QUOTA, TTL_S = 12, 8, 20.0
# Two tenants, each with a tree: a chain that forks, and a chain beside it.
PARENTS = {0: None, 1: 0, 2: 1, 3: 1, 4: 3, 5: None, 6: 5, 7: None, 8: 7, 9: 8, 10: 7, 11: None}
CHAINS = ((0, 1, 2), (0, 1, 3, 4), (5, 6), (7, 8, 9), (7, 10), (11,))
NUMBERS = st.sampled_from(sorted(PARENTS))


def key_of(number: int | None) -> bytes:
    return b"" if number is None else bytes([number]) * 32


def id_of(number: int) -> PageId:
    return PageId(key_of(number), 1_000 + number, bytes([number]) * 64)


def page_of(number: int) -> Page:
    tenant = b"a" if number < 7 else b"b"
    return Page(id_of(number), key_of(PARENTS[number]), tenant=tenant, saving_s=1.0 + number % 3)


def size_of(number: int) -> int:
    return 1 + number % 2


@dataclass(slots=True)
class Known:
    """What the model knows of an entry that has a place."""

    number: int
    entry: Entry
    state: str = "writing"
    refs: int = 0
    expires_s: float = 0.0
    held_s: float = 0.0


class IndexMachine(RuleBasedStateMachine):
    policy_name = "lru"

    def __init__(self) -> None:
        super().__init__()
        make = policy_of(self.policy_name)
        self.index = TierIndex(CAPACITY, make(), TTL_S, QUOTA, make)
        self.now_s = 0.0
        self.known: list[Known] = []  # has a place
        self.pins: list[list[Entry]] = []

    # ---- the model

    def found(self, number: int) -> Known | None:
        """What is in the index under the key, in whatever state."""
        return next((one for one in self.known if one.number == number and one.state != "evicting"), None)

    def of(self, entry: Entry) -> Known:
        return next(one for one in self.known if one.entry is entry)

    def readable(self, number: int) -> bool:
        one = self.found(number)
        return one is not None and one.state == "ready" and max(one.expires_s, one.held_s) > self.now_s

    def idle(self, one: Known) -> bool:
        return one.state == "ready" and not one.refs and one.held_s <= self.now_s

    def evictable(self, one: Known, coming: int) -> bool:
        below = {PARENTS[other.number] for other in self.known if other.state != "evicting"} | {PARENTS[coming]}
        return self.idle(one) and one.number not in below

    def bytes_of(self, tenant: bytes | None = None) -> int:
        return sum(size_of(one.number) for one in self.known if tenant in (None, page_of(one.number).tenant))

    def left(self, entries: list[Entry]) -> None:
        """Their places are free."""
        for entry in entries:
            one = self.of(entry)
            assert not one.refs
            self.known.remove(one)

    # ---- rules

    @rule(number=NUMBERS)
    def write(self, number: int) -> None:
        page, size = page_of(number), size_of(number)
        granted, evicted = self.index.make_room(page, size, self.now_s)
        here = self.found(number)
        if here is not None:
            outlived = self.idle(here) and here.expires_s <= self.now_s
            if not outlived:
                assert not granted
                assert not evicted
                return
            assert evicted[0] is here.entry
            self.left([evicted.pop(0)])
        for entry in evicted:  # each was needed, and allowed to leave
            over_quota = self.bytes_of(page.tenant) + size > QUOTA
            assert over_quota or self.bytes_of() + size > CAPACITY
            assert self.evictable(self.of(entry), number)
            assert not over_quota or entry.page.tenant == page.tenant
            self.left([entry])
        over_quota = self.bytes_of(page.tenant) + size > QUOTA
        assert granted == (not over_quota and self.bytes_of() + size <= CAPACITY)
        if not granted:  # then nothing else may leave
            tenants = {page.tenant} if over_quota else {b"a", b"b"}
            assert not any(self.evictable(one, number) for one in self.known if page_of(one.number).tenant in tenants)
            return
        entry = self.index.begin(page, size, number, self.now_s)
        self.known.append(Known(number, entry, expires_s=self.now_s + TTL_S))

    @precondition(lambda self: any(one.state == "writing" for one in self.known))
    @rule(verdict=st.sampled_from(["commit", "commit", "commit", "abort"]))
    def finish(self, verdict: str) -> None:
        one = next(one for one in self.known if one.state == "writing")
        if verdict == "commit":
            self.index.commit(one.entry)
            one.state = "ready"
        else:
            self.index.abort(one.entry)
            self.known.remove(one)

    @rule(chain=st.sampled_from(CHAINS))
    def store_a_chain(self, chain: tuple[int, ...]) -> None:
        for number in chain:
            self.write(number)
            one = self.found(number)
            if one is not None and one.state == "writing":
                self.index.commit(one.entry)
                one.state = "ready"

    @rule(chain=st.sampled_from(CHAINS))
    def pin(self, chain: tuple[int, ...]) -> None:
        entries = self.index.pin([id_of(number) for number in chain], self.now_s)
        readable = next((at for at, number in enumerate(chain) if not self.readable(number)), len(chain))
        assert [entry.key for entry in entries] == [key_of(number) for number in chain[:readable]]
        for entry in entries:
            self.of(entry).refs += 1
        self.pins.append(entries)

    @rule(numbers=st.sets(NUMBERS, max_size=4).map(sorted))
    def pin_each(self, numbers: list[int]) -> None:
        entries = self.index.pin_each([id_of(number) for number in numbers], self.now_s)
        expected = [key_of(number) if self.readable(number) else None for number in numbers]
        assert [entry and entry.key for entry in entries] == expected
        pinned = [entry for entry in entries if entry is not None]
        for entry in pinned:
            self.of(entry).refs += 1
        self.pins.append(pinned)

    @precondition(lambda self: self.pins)
    @rule(at=st.integers(0, 5))
    def unpin(self, at: int) -> None:
        entries = self.pins.pop(at % len(self.pins))
        freed = self.index.unpin(entries)
        for entry in entries:
            self.of(entry).refs -= 1
        expected = [entry for entry in entries if self.of(entry).state == "evicting" and not self.of(entry).refs]
        assert freed == expected
        self.left(freed)

    @rule(number=NUMBERS)
    def drop(self, number: int) -> None:
        one = self.found(number)
        freed = self.index.drop(key_of(number))
        if one is None or one.state != "ready":
            assert not freed
            return
        one.state = "evicting"
        assert freed == ([] if one.refs else [one.entry])
        self.left(freed)

    @rule()
    def expire(self) -> None:
        expected = [one.entry for one in self.known if self.idle(one) and one.expires_s <= self.now_s]
        freed = self.index.expire(self.now_s)
        assert freed == expected
        self.left(freed)

    @rule(number=NUMBERS, seconds=st.sampled_from([0.0, 5.0, 50.0]))
    def hold(self, number: int, seconds: float) -> None:
        one = self.found(number)
        held = self.index.hold(key_of(number), self.now_s + seconds)
        assert held == (one is not None and one.state == "ready")
        if held and one is not None:
            one.held_s = self.now_s + seconds

    @rule(seconds=st.sampled_from([0.5, 4.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    # ---- what always holds

    @invariant()
    def what_is_found_is_what_the_model_finds(self) -> None:
        for number in PARENTS:
            assert self.index.present([id_of(number)], self.now_s) == self.readable(number)
            for other in (replace(id_of(number), fingerprint=7), replace(id_of(number), tokens=bytes([99]) * 64)):
                assert self.index.present([other], self.now_s) == 0
        assert len(self.index) == sum(one.state != "evicting" for one in self.known)

    @invariant()
    def bytes_are_those_of_all_places_in_use(self) -> None:
        assert self.index.used_bytes == self.bytes_of() <= CAPACITY
        expected = {tenant: self.bytes_of(tenant) for tenant in (b"a", b"b") if self.bytes_of(tenant)}
        assert self.index.tenants() == expected
        assert max(expected.values(), default=0) <= QUOTA


class S3FifoMachine(IndexMachine):
    policy_name = "s3-fifo"


class GdsfMachine(IndexMachine):
    policy_name = "gdsf"


STEPS = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
TestIndexUnderLru = IndexMachine.TestCase
TestIndexUnderLru.settings = STEPS
TestIndexUnderS3Fifo = S3FifoMachine.TestCase
TestIndexUnderS3Fifo.settings = STEPS
TestIndexUnderGdsf = GdsfMachine.TestCase
TestIndexUnderGdsf.settings = STEPS


def stored(index: TierIndex, number: int, now_s: float = 0.0) -> Entry:
    granted, _ = index.make_room(page_of(number), 1, now_s)
    assert granted
    entry = index.begin(page_of(number), 1, number, now_s)
    index.commit(entry)
    return entry


def test_a_page_that_is_being_written_is_not_found() -> None:
    index = TierIndex(4, Lru(), TTL_S)
    entry = index.begin(page_of(0), 1, 0, 0.0)
    assert index.present([id_of(0)], 0.0) == 0
    assert not index.pin([id_of(0)], 0.0)
    index.commit(entry)
    assert index.present([id_of(0)], 0.0) == 1


def test_a_page_dropped_while_it_is_read_keeps_its_bytes_until_the_last_reader_is_done() -> None:
    index = TierIndex(1, Lru(), TTL_S)
    entry = stored(index, 0)
    first, second = index.pin([id_of(0)], 0.0), index.pin([id_of(0)], 0.0)
    assert index.drop(key_of(0)) == []
    assert index.present([id_of(0)], 0.0) == 0
    assert index.make_room(page_of(5), 1, 0.0) == (False, [])
    assert index.unpin(first) == []
    assert index.unpin(second) == [entry]
    assert index.used_bytes == 0
    assert index.make_room(page_of(5), 1, 0.0) == (True, [])


def test_a_page_that_outlived_its_time_makes_way_for_itself() -> None:
    index = TierIndex(4, Lru(), TTL_S)
    old = stored(index, 0)
    assert index.make_room(page_of(0), 1, TTL_S) == (True, [old])


def test_a_chain_gives_its_last_page_first() -> None:
    index = TierIndex(3, Lru(), TTL_S)
    for number in (0, 1, 2):
        stored(index, number)
    _, evicted = index.make_room(page_of(11), 3, 0.0)
    assert [entry.place for entry in evicted] == [2, 1, 0]


def test_a_page_that_comes_in_does_not_push_out_its_own_parent() -> None:
    index = TierIndex(2, Lru(), TTL_S)
    stored(index, 0)
    stored(index, 1)
    assert index.make_room(page_of(2), 1, 0.0) == (False, [])


@pytest.mark.parametrize("name", ["lru", "s3-fifo", "gdsf"])
def test_a_tenant_at_its_quota_gives_up_its_own_pages(name: str) -> None:
    make = policy_of(name)
    index = TierIndex(10, make(), TTL_S, 2, make)
    for number in (7, 0, 1):
        stored(index, number)
    granted, evicted = index.make_room(page_of(5), 1, 0.0)
    assert granted
    assert [entry.place for entry in evicted] == [1]
    assert index.tenants() == {b"a": 1, b"b": 1}


def test_chains_whose_ends_are_dear_leave_whole_under_gdsf_before_what_is_dearer_yet() -> None:
    """Parents are cheaper than their children, so their turn passes while these are there."""
    index = TierIndex(80, Gdsf(), TTL_S)

    def store(number: int, parent: bytes, saving_s: float) -> list[int]:
        page = Page(PageId(number.to_bytes(32, "big"), 0, b""), parent, saving_s=saving_s)
        granted, evicted = index.make_room(page, 1, 0.0)
        assert granted
        index.commit(index.begin(page, 1, number, 0.0))
        return [entry.place for entry in evicted]

    for chain in range(20):
        for depth in range(3):
            parent = (100 * chain + depth - 1).to_bytes(32, "big") if depth else b""
            store(100 * chain + depth, parent, 1.0 + depth)
    for number in range(5_000, 5_020):
        store(number, b"", 50.0)
    evicted = [place for number in range(6_000, 6_060) for place in store(number, b"", 50.0)]
    assert evicted == [100 * chain + depth for chain in range(20) for depth in (2, 1, 0)]
