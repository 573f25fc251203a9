"""Thousands of crashes at every kind of operation: what the next start finds is right, whole, and all that was promised."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Sequence
from contextlib import suppress

import pytest

from kv_store.disk.disk_tier import DiskTier
from kv_store.disk.layout import DiskLimits, layout_of
from kv_store.lru import Lru
from kv_store.page import Page
from kv_store.tier import Change, TierFailed
from tests.kv_store.chains import SMALL, bytes_of, key_of, page_of
from tests.kv_store.memory_disk import SURVIVALS, Crash, MemoryDisk, Operation

PAGES = 32
LIVES = 4
ACTIONS = 24
GROUPS = 10
GROUPS_WITH_FAULTS = 3
SEEDS_PER_GROUP = 100
# Four slots in each of five segments, one of which compaction keeps free.
LIMITS = DiskLimits(capacity_bytes=225_000, ttl_s=500.0, segment_bytes=4096 + 4 * 8192)
CONTENTS = [bytes_of(number) for number in range(PAGES)]


class History:
    """What was promised so far, over all lives. known: told as stored and not as evicted, in this life."""

    def __init__(self) -> None:
        self.known: set[bytes] = set()
        self.left: set[bytes] = set()
        self.removed: set[bytes] = set()
        self.now_s = 1000.0

    def heard(self, change: Change, pages: Sequence[Page]) -> None:
        keys = {page.id.key for page in pages}
        if change == "stored":
            self.known |= keys
            self.left -= keys
        else:
            self.known -= keys
            self.left |= keys

    def clock(self) -> float:
        return self.now_s

    def tier(self, disk: MemoryDisk) -> DiskTier:
        return DiskTier(lambda: disk, SMALL, LIMITS, Lru(), self.heard, self.clock)


def act(tier: DiskTier, history: History, rng: random.Random) -> None:
    history.now_s += rng.choice((1.0, 1.0, 1.0, 30.0))
    first = rng.randrange(PAGES)
    numbers = [number % PAGES for number in range(first, first + rng.randint(1, 6))]
    match rng.choices(("write", "read", "remove"), (7, 2, 1))[0]:
        case "write":
            history.removed -= {key_of(number) for number in numbers}
            tier.write([page_of(number) for number in numbers], [CONTENTS[number] for number in numbers])
        case "read":
            check_read(tier, numbers)
        case _:
            keys = [key_of(number) for number in numbers]
            tier.remove(keys)
            history.removed |= set(keys)


def check_read(tier: DiskTier, numbers: Sequence[int]) -> int:
    into = [SMALL.empty() for _ in numbers]
    good = tier.read([page_of(number).id for number in numbers], into)
    for number, content in zip(numbers[:good], into, strict=False):
        assert (content == CONTENTS[number]).all(), "a wrong byte was served"
    return good


def check_start(tier: DiskTier, promised: set[bytes], history: History) -> None:
    """Of a tier that was just opened. promised: what was known before the crash."""
    used_bytes, failures = tier.used_bytes(), tier.counters.verify_failures.total()
    readable = {key_of(number) for number in range(PAGES) if check_read(tier, [number])}
    assert readable == history.known
    assert tier.counters.verify_failures.total() == failures, "a page was counted as there that could not be read"
    layout = layout_of(SMALL, LIMITS)
    assert (
        used_bytes == tier.used_bytes() == len(readable) * layout.record_bytes <= layout.records * layout.record_bytes
    )
    assert not readable & history.removed, "a removed page came back"
    assert len(promised - readable - history.left) <= tier.counters.expired, "a synced page was lost"


def no_faults(disk: MemoryDisk) -> None:
    pass


def live(
    disk: MemoryDisk, history: History, rng: random.Random, change_faults: Callable[[MemoryDisk], None] = no_faults
) -> None:
    promised = set(history.known)
    history.known, history.left = set(), set()
    try:
        tier = history.tier(disk)
        check_start(tier, promised, history)
        for _ in range(ACTIONS):
            change_faults(disk)
            with suppress(TierFailed):
                act(tier, history, rng)
        if rng.random() < 0.1:
            tier.close()
    except Crash:
        if not disk.operations:
            raise
    # A start that did not end promised nothing, and took nothing back.
    if not history.known and not history.left:
        history.known = promised


@pytest.mark.parametrize("group", range(GROUPS))
def test_no_crash_makes_a_wrong_byte_or_loses_a_synced_page(group: int) -> None:
    for seed in range(group * SEEDS_PER_GROUP, (group + 1) * SEEDS_PER_GROUP):
        rng = random.Random(seed)
        history = History()
        disk = MemoryDisk(alignment=rng.choice((1, 4096)), crash_at=rng.randrange(180))
        for _ in range(LIVES):
            live(disk, history, rng)
            assert disk.peak_bytes <= LIMITS.capacity_bytes
            disk = disk.after_crash(
                rng, rng.choice(SURVIVALS), crash_at=rng.choice((rng.randrange(12), rng.randrange(180)))
            )


@pytest.mark.parametrize("group", range(GROUPS_WITH_FAULTS))
def test_no_crash_after_failing_calls_does_either(group: int) -> None:
    """Writes, syncs, reads, new files and renames fail now and then, before the crash."""
    operations: tuple[Operation, ...] = ("write", "resize", "sync", "read", "open", "rename")
    for seed in range(group * SEEDS_PER_GROUP, (group + 1) * SEEDS_PER_GROUP):
        rng = random.Random(f"faults {seed}")

        def change_faults(disk: MemoryDisk, rng: random.Random = rng) -> None:
            disk.faults.clear()
            if rng.random() < 0.3:
                disk.faults[rng.choice(operations)] = rng.choice((errno.EIO, errno.ENOSPC))

        history = History()
        disk = MemoryDisk(alignment=rng.choice((1, 4096)))
        for _ in range(LIVES):
            live(disk, history, rng, change_faults)
            assert disk.peak_bytes <= LIMITS.capacity_bytes
            disk = disk.after_crash(rng, rng.choice(SURVIVALS), crash_at=rng.randrange(20, 400))
