"""The disk tier against a dict: any sequence of calls, restarts among them."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kv_store.disk.disk_tier import DiskTier
from kv_store.disk.layout import DiskLimits, layout_of
from kv_store.lru import Lru
from kv_store.page import Page
from kv_store.tier import Change
from tests.kv_store.chains import SMALL, bytes_of, key_of, page_of
from tests.kv_store.memory_disk import MemoryDisk

PAGES = 24
TENANTS = (b"", b"a" * 16)
LIMITS = DiskLimits(capacity_bytes=180_000, ttl_s=100.0, tenant_bytes=9 * 8192, segment_bytes=4096 + 3 * 8192)
LAYOUT = layout_of(SMALL, LIMITS)
numbers_of = st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=5, unique=True)


class DiskMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.naive: dict[bytes, tuple[float, bytes]] = {}  # by key: when it was stored, and whose it is
        self.now_s = 1000.0
        self.disk = MemoryDisk()
        self.tier = self.opened()

    def opened(self) -> DiskTier:
        return DiskTier(lambda: self.disk, SMALL, LIMITS, Lru(), self.heard, lambda: self.now_s)

    def heard(self, change: Change, pages: Sequence[Page]) -> None:
        for page in pages:
            if change == "evicted":
                del self.naive[page.id.key]
            else:
                stored_s = self.naive[page.id.key][0] if page.id.key in self.naive else self.now_s
                self.naive[page.id.key] = (stored_s, page.tenant)

    @rule(numbers=numbers_of)
    def write(self, numbers: list[int]) -> None:
        pages = [page_of(number, TENANTS[number % 3 == 0]) for number in numbers]
        here = self.tier.write(pages, [bytes_of(number) for number in numbers])
        assert here == sum(page.id.key in self.naive for page in pages)

    @rule(numbers=numbers_of)
    def read(self, numbers: list[int]) -> None:
        into = [SMALL.empty() for _ in numbers]
        good = self.tier.read([page_of(number).id for number in numbers], into)
        expected = next((at for at, number in enumerate(numbers) if not self.there(number)), len(numbers))
        assert good == expected
        for number, content in zip(numbers[:good], into, strict=False):
            assert (content == bytes_of(number)).all()

    @rule(numbers=numbers_of)
    def remove(self, numbers: list[int]) -> None:
        there = sum(key_of(number) in self.naive for number in numbers)
        assert self.tier.remove([key_of(number) for number in numbers]) == there

    @rule(seconds=st.sampled_from((1.0, 40.0)))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def restart(self) -> None:
        self.tier.close()
        self.start_again()

    @rule()
    def die_and_start(self) -> None:
        self.start_again()

    def start_again(self) -> None:
        before, self.naive = self.naive, {}
        expired = {key for key, (stored_s, _) in before.items() if stored_s + LIMITS.ttl_s <= self.now_s}
        self.tier = self.opened()
        assert set(self.naive) == set(before) - expired
        self.naive = {key: before[key] for key in self.naive}

    def there(self, number: int) -> bool:
        stored = self.naive.get(key_of(number))
        return stored is not None and stored[0] + LIMITS.ttl_s > self.now_s

    @invariant()
    def accounting_is_exact(self) -> None:
        assert self.tier.used_bytes() == len(self.naive) * LAYOUT.record_bytes
        for tenant in TENANTS:
            held = sum(owner == tenant for _, owner in self.naive.values())
            assert held * LAYOUT.record_bytes <= LIMITS.tenant_bytes
        assert self.disk.peak_bytes <= LIMITS.capacity_bytes
        assert not self.tier.counters.verify_failures


TestDiskAgainstADict = DiskMachine.TestCase
TestDiskAgainstADict.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
