"""A disk that is full, broken, read-only, missing or somebody else's: one TierFailed, a pause that grows, and serving goes on."""

from __future__ import annotations

import errno
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kv_store.disk.device import Disk
from kv_store.disk.disk_tier import DiskTier
from kv_store.disk.layout import DiskLimits, layout_of
from kv_store.host_tier import HostTier
from kv_store.lru import Lru
from kv_store.tier import TierFailed
from kv_store.tier_index import TierIndex
from kv_store.tiered_store import TieredStore
from pdserve.errors import ConfigInvalid
from tests.kv_store.chains import SMALL, bytes_of, key_of, page_of
from tests.kv_store.memory_disk import Hang, MemoryDisk, Operation

SOON_S = 60.0  # of a busy machine, for what waits for nobody
LIMITS = DiskLimits(capacity_bytes=275_000, segment_bytes=4096 + 4 * 8192)


class Bench:
    """A tier on `disk`, or one that cannot be mounted for as long as `mount_error` is set."""

    def __init__(self, disk: MemoryDisk, mount_error: int = 0) -> None:
        self.disk = disk
        self.mount_error = mount_error
        self.now_s = 1000.0
        self.tier = DiskTier(self.mount, SMALL, LIMITS, Lru(), lambda change, pages: None, lambda: self.now_s)

    def mount(self) -> Disk:
        if self.mount_error:
            raise OSError(self.mount_error, "not now")
        return self.disk

    def write(self, *numbers: int) -> int:
        return self.tier.write([page_of(number) for number in numbers], [bytes_of(number) for number in numbers])

    def read(self, *numbers: int) -> int:
        into = [SMALL.empty() for _ in numbers]
        good = self.tier.read([page_of(number).id for number in numbers], into)
        assert all((into[at] == bytes_of(numbers[at])).all() for at in range(good))
        return good


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("operation", ["write", "sync", "resize", "open"])
def test_a_store_that_fails_is_told_once_then_pages_are_dropped_and_reads_go_on(
    operation: Operation, code: int
) -> None:
    bench = Bench(MemoryDisk())
    bench.write(0, 1, 2, 3)  # the segment is full: the next page needs all of these operations
    bench.disk.faults[operation] = code
    with pytest.raises(TierFailed):
        bench.write(4)
    assert (bench.write(4), bench.write(5)) == (0, 0)
    assert bench.read(0, 1, 2, 3) == 4
    counters = bench.tier.counters
    assert (counters.failures, counters.dropped, counters.stored) == (1, 3, 4)
    bench.disk.faults.clear()
    bench.now_s += 1.0
    assert bench.write(4, 5) == 2
    assert bench.read(4, 5) == 2


def test_the_pause_doubles_with_each_failure_in_a_row_up_to_a_minute() -> None:
    bench = Bench(MemoryDisk())
    bench.disk.faults["write"] = errno.ENOSPC
    for pause_s in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0):
        with pytest.raises(TierFailed):
            bench.write(0)
        bench.now_s += pause_s - 0.25
        assert bench.write(0) == 0
        bench.now_s += 0.25


def test_a_success_ends_the_row_of_failures() -> None:
    bench = Bench(MemoryDisk())
    for _ in range(3):
        bench.disk.faults["write"] = errno.EIO
        with pytest.raises(TierFailed):
            bench.write(0)
        bench.disk.faults.clear()
        bench.now_s += 1.0
        assert bench.write(1) == 1
        bench.tier.remove([key_of(1)])


def test_a_clock_that_jumps_back_does_not_lengthen_the_pause() -> None:
    bench = Bench(MemoryDisk())
    bench.disk.faults["write"] = errno.EIO
    with pytest.raises(TierFailed):
        bench.write(0)
    bench.disk.faults.clear()
    bench.now_s -= 3600.0
    assert bench.write(0) == 1


def test_a_page_that_cannot_be_read_is_dropped_and_the_others_return_after_the_pause() -> None:
    bench = Bench(MemoryDisk())
    bench.write(0, 1, 4)
    bench.disk.faults["read"] = errno.EIO
    with pytest.raises(TierFailed):
        bench.read(4)
    assert (bench.read(0, 1), bench.tier.present([page_of(0).id])) == (0, 0)
    bench.disk.faults.clear()
    bench.now_s += 1.0
    assert bench.read(0, 1) == 2
    assert bench.read(4) == 0
    assert bench.write(4) == 1


def test_a_bad_sector_costs_its_page_and_none_beside_it() -> None:
    bench = Bench(MemoryDisk())
    bench.write(0, 1, 2, 3)
    folder = SMALL.digest().hex()
    bench.disk.files[f"{folder}/segment-0000"].bad.add((4096 + 2 * 8192) // 4096)  # page 2
    assert bench.read(0, 1, 2, 3) == 2
    with pytest.raises(TierFailed):
        bench.read(2)
    bench.now_s += 1.0
    assert bench.read(0, 1, 2, 3) == 2
    assert bench.read(3) == 1
    assert bench.tier.counters.failures == 1


def test_pages_of_a_failed_sync_are_not_there_and_never_come_back_wrong() -> None:
    bench = Bench(MemoryDisk())
    bench.write(0)
    bench.disk.faults["sync"] = errno.EIO
    with pytest.raises(TierFailed):
        bench.write(1, 2)
    assert bench.tier.present([page_of(1).id]) == 0
    bench.disk.faults.clear()
    bench.now_s += 1.0
    assert bench.write(1, 2) == 2
    again = Bench(bench.disk)
    assert again.read(0, 1, 2) == 3


def test_a_removal_that_cannot_be_promised_is_told() -> None:
    bench = Bench(MemoryDisk())
    bench.write(0)
    bench.disk.faults["sync"] = errno.EIO
    with pytest.raises(TierFailed):
        bench.tier.remove([key_of(0)])
    assert bench.tier.present([page_of(0).id]) == 0


def test_a_directory_that_cannot_be_opened_is_tried_again_and_then_has_its_pages() -> None:
    disk = MemoryDisk()
    Bench(disk).write(0, 1)
    bench = Bench(disk, mount_error=errno.EROFS)
    assert (bench.tier.counters.failures, bench.read(0), bench.write(4)) == (1, 0, 0)
    bench.now_s += 1.0
    with pytest.raises(TierFailed):
        bench.write(4)
    bench.mount_error = 0
    bench.now_s += 2.0
    assert bench.write(4) == 1
    assert bench.read(0, 1) == 2


def test_a_closed_tier_stores_and_finds_nothing() -> None:
    bench = Bench(MemoryDisk())
    bench.write(0)
    bench.tier.close()
    bench.tier.close()
    assert (bench.write(1), bench.read(0), bench.tier.present([page_of(0).id])) == (0, 0, 0)


# ---- a disk that hangs


@pytest.mark.parametrize("operation", ["write", "sync"])
def test_a_load_does_not_wait_for_a_store_that_the_disk_holds_up(operation: Operation) -> None:
    """Through the store as a worker has it: pages that left the host tier, while the thread that writes them down hangs."""
    bench = Bench(MemoryDisk())
    host = HostTier(SMALL, TierIndex(2 * SMALL.size_bytes, Lru(), ttl_s=3600.0), lambda change, pages: None)
    store = TieredStore(host, [bench.tier], SMALL.size_bytes)
    store.save([page_of(0), page_of(1)], [bytes_of(0), bytes_of(1)])
    assert store.settle(time.monotonic() + SOON_S)
    host.remove([key_of(0), key_of(1)])
    bench.disk.hang = hang = Hang(operation)
    into = [SMALL.empty(), SMALL.empty()]
    with ThreadPoolExecutor(1) as loads:
        try:
            store.save([page_of(4)], [bytes_of(4)])
            assert hang.entered.wait(SOON_S)
            loading = loads.submit(store.load, [page_of(0).id, page_of(1).id], into, float("inf"))
            assert loading.result(SOON_S).by_tier == {"disk": 2}
            assert bench.tier.present([page_of(4).id]) == 0  # the store still hangs
        finally:
            hang.let_go.set()
    assert all((into[at] == bytes_of(at)).all() for at in (0, 1))
    assert store.settle(time.monotonic() + SOON_S)
    assert bench.read(4) == 1
    store.close()


# ---- sizes


def test_a_capacity_of_less_than_two_segments_is_refused() -> None:
    with pytest.raises(ConfigInvalid):
        layout_of(SMALL, DiskLimits(capacity_bytes=50_000, segment_bytes=LIMITS.segment_bytes))


def test_more_segments_than_open_files_is_refused() -> None:
    with pytest.raises(ConfigInvalid):
        layout_of(SMALL, DiskLimits(capacity_bytes=2**40, segment_bytes=64 * 2**20))


@pytest.mark.parametrize("capacity_mib", [3, 16, 64, 300, 1024, 2**14, 2**16, 2**20])
def test_segments_are_chosen_for_any_capacity(capacity_mib: int) -> None:
    layout = layout_of(SMALL, DiskLimits(capacity_bytes=capacity_mib * 2**20))
    assert 2 <= layout.segments <= 512
    assert layout.total_bytes // 4 < layout.records * layout.record_bytes < layout.total_bytes


@pytest.mark.parametrize("capacity_bytes", [100_000, 275_000, 1_000_000])
def test_all_files_together_never_exceed_the_capacity(capacity_bytes: int) -> None:
    disk = MemoryDisk()
    limits = DiskLimits(capacity_bytes=capacity_bytes, segment_bytes=LIMITS.segment_bytes)
    tier = DiskTier(lambda: disk, SMALL, limits, Lru(), lambda change, pages: None)
    for number in range(400):
        tier.write([page_of(number)], [bytes_of(number)])
        if number % 7 == 0:
            tier.remove([key_of(number - 2)])
    assert disk.peak_bytes <= capacity_bytes
    assert tier.used_bytes() > capacity_bytes // 5
