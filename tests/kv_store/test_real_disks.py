"""The disk tier on the real file system: what the kernel itself refuses, and how bytes lie."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kv_store.disk.disk_tier import DiskTier
from kv_store.disk.layout import DiskLimits
from kv_store.disk.posix import PosixDisk, posix_mount
from kv_store.lru import Lru
from kv_store.tier import TierFailed
from tests.kv_store.chains import ALIGNED, SMALL, bytes_of, page_of
from tests.refused_calls import Access, while_refused

ROOT = Path(__file__).resolve().parents[2]
LIMITS = DiskLimits(capacity_bytes=275_000, segment_bytes=4096 + 4 * 8192)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def posix_tier(folder: Path, clock: Callable[[], float] = lambda: 1000.0) -> DiskTier:
    return DiskTier(posix_mount(folder), SMALL, LIMITS, Lru(), lambda change, pages: None, clock)


def store(tier: DiskTier, *numbers: int) -> int:
    return tier.write([page_of(number) for number in numbers], [bytes_of(number) for number in numbers])


def load(tier: DiskTier, *numbers: int) -> int:
    """How many were read; those are compared byte by byte."""
    into = [SMALL.empty() for _ in numbers]
    good = tier.read([page_of(number).id for number in numbers], into)
    assert all((into[at] == bytes_of(numbers[at])).all() for at in range(good))
    return good


def test_a_file_in_place_of_the_directory_turns_the_tier_off(tmp_path: Path) -> None:
    (tmp_path / "disk").write_text("not a directory")
    tier = posix_tier(tmp_path / "disk")
    assert tier.counters.failures == 1
    assert tier.write([page_of(0)], [bytes_of(0)]) == 0
    assert tier.used_bytes() == 0


def test_a_directory_has_one_owner(tmp_path: Path) -> None:
    first = posix_tier(tmp_path)
    first.write([page_of(0)], [bytes_of(0)])
    second = posix_tier(tmp_path)
    assert (second.counters.failures, second.present([page_of(0).id])) == (1, 0)
    first.close()
    third = posix_tier(tmp_path)
    assert third.present([page_of(0).id]) == 1
    third.close()


@pytest.mark.parametrize("shift_bytes", [0, 8])
def test_pages_that_lie_aligned_or_not_go_to_a_real_disk_and_back(tmp_path: Path, shift_bytes: int) -> None:
    """Aligned rows go past the tier's own buffers."""
    limits = DiskLimits(capacity_bytes=2**20, segment_bytes=2**17)
    tier = DiskTier(posix_mount(tmp_path), ALIGNED, limits, Lru(), lambda change, pages: None)
    memory = np.frombuffer(mmap.mmap(-1, 8 * 4096), dtype=np.uint8)
    rows = memory[shift_bytes : shift_bytes + 4 * 4096].reshape(2, 2 * 4096)[:, :4096]
    rows[:] = bytes_of(0, ALIGNED)
    assert tier.write([page_of(0)], [rows]) == 1
    rows[:] = 0
    assert tier.read([page_of(0).id], [rows]) == 1
    assert (rows == bytes_of(0, ALIGNED)).all()
    assert not memory[shift_bytes + 4096 : shift_bytes + 2 * 4096].any()
    tier.close()


CHILD = """
import resource, sys
from pathlib import Path
from tests.kv_store.test_real_disks import bytes_of, page_of, posix_tier
from kv_store.tier import TierFailed
tier = posix_tier(Path(sys.argv[1]))
assert tier.write([page_of(0)], [bytes_of(0)]) == 1
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    tier.write([page_of(number) for number in range(1, 9)], [bytes_of(number) for number in range(1, 9)])
except TierFailed as failed:
    print("failed", tier.present([page_of(0).id]), tier.write([page_of(1)], [bytes_of(1)]), tier.counters.failures)
"""


def test_a_real_limit_of_the_kernel_turns_stores_off_and_nothing_else(tmp_path: Path) -> None:
    """Files beyond the limit cannot grow: the second segment gets EFBIG."""
    command = [sys.executable, "-c", CHILD, str(tmp_path / "disk")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60.0, check=False)
    assert done.stdout.split()[-4:] == ["failed", "1", "0", "1"], done.stderr
    tier = posix_tier(tmp_path / "disk")
    assert tier.present([page_of(0).id]) == 1
    tier.close()


READ_ONLY_CHILD = """
import os, sys
from pathlib import Path
from tests.kv_store.test_real_disks import SMALL, bytes_of, page_of, posix_tier
from kv_store.tier import TierFailed
def become_nobody():
    if os.getuid() == 0:  # whom no mode of a file stops
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
def protect():
    for path in [Path("disk"), *Path("disk").rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
os.chdir(sys.argv[1])  # the directories above belong to one user alone
if sys.argv[2] == "at the start":
    protect()
    become_nobody()
tier = posix_tier(Path("disk"))
if sys.argv[2] == "while it is used":
    assert tier.write([page_of(number) for number in range(4)], [bytes_of(number) for number in range(4)]) == 4
    protect()
    become_nobody()
try:
    tier.write([page_of(4)], [bytes_of(4)])
    print("dropped", end=" ")
except TierFailed as failed:
    print("failed" if isinstance(failed.__cause__, PermissionError) else repr(failed.__cause__), end=" ")
into = [SMALL.empty() for _ in range(4)]
good = tier.read([page_of(number).id for number in range(4)], into)
assert all((into[at] == bytes_of(at)).all() for at in range(good))
print(good, tier.write([page_of(4)], [bytes_of(4)]), tier.counters.failures)
"""


@pytest.mark.parametrize(
    ("moment", "told"), [("at the start", ["dropped", "0", "0", "1"]), ("while it is used", ["failed", "4", "0", "1"])]
)
def test_a_real_directory_that_cannot_be_written_to_turns_stores_off_and_keeps_its_pages(
    tmp_path: Path, moment: str, told: list[str]
) -> None:
    """The segment is full: the next page needs a new file."""
    disk = tmp_path / "disk"
    if moment == "at the start":
        tier = posix_tier(disk)
        assert tier.write([page_of(number) for number in range(4)], [bytes_of(number) for number in range(4)]) == 4
        tier.close()
    else:
        disk.mkdir()
    tmp_path.chmod(0o755)
    command = [sys.executable, "-c", READ_ONLY_CHILD, str(tmp_path), moment]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60.0, check=False, env=environment, cwd=ROOT)
    assert done.stdout.split()[-4:] == told, done.stderr
    for path in [disk, *disk.rglob("*")]:
        path.chmod(0o755)
    tier = posix_tier(disk)
    assert tier.present([page_of(number).id for number in range(4)]) == 4
    tier.close()


def test_a_real_file_system_without_room_turns_stores_off_and_is_left_as_it_was() -> None:
    """ENOSPC by the kernel: a segment larger than the memory file system it is to lie in. Nothing of it is ever allocated."""
    room = os.statvfs("/dev/shm")
    assert room.f_blocks, "a memory file system without a size would take anything"
    segment_bytes = room.f_blocks * room.f_frsize + 2**20
    limits = DiskLimits(capacity_bytes=4 * segment_bytes, segment_bytes=segment_bytes)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        tier = DiskTier(posix_mount(Path(folder)), SMALL, limits, Lru(), lambda change, pages: None, lambda: 1000.0)
        with pytest.raises(TierFailed) as failed:
            tier.write([page_of(0)], [bytes_of(0)])
        assert isinstance(failed.value.__cause__, OSError)
        assert failed.value.__cause__.errno == errno.ENOSPC
        assert (tier.write([page_of(0)], [bytes_of(0)]), tier.present([page_of(0).id]), tier.used_bytes()) == (0, 0, 0)
        assert (tier.counters.failures, tier.counters.dropped) == (1, 2)
        assert sum(path.stat().st_blocks for path in Path(folder).rglob("*")) < 100
        tier.close()


@pytest.mark.parametrize("access", ["write", "sync"])
def test_stores_that_the_kernel_answers_with_an_input_output_error_pause_and_reads_go_on(
    tmp_path: Path, access: Access
) -> None:
    """A system call returns EIO, as one of a broken disk would, to the thread that stores."""
    clock = Clock()
    tier = posix_tier(tmp_path, clock)
    assert store(tier, 0, 1, 2, 3) == 4  # the segment is full: the next page needs a new one
    for failures, pause_s in ((1, 1.0), (2, 2.0)):
        with pytest.raises(TierFailed) as failed:
            while_refused(access, lambda: store(tier, 4, 5))
        assert isinstance(failed.value.__cause__, OSError)
        assert failed.value.__cause__.errno == errno.EIO
        assert (store(tier, 4), load(tier, 0, 1, 2, 3), tier.counters.failures) == (0, 4, failures)
        clock.now_s += pause_s
    assert (tier.counters.stored, tier.counters.dropped) == (4, 6)
    assert store(tier, 4, 5) == 2
    assert load(tier, 4, 5) == 2
    tier.close()
    again = posix_tier(tmp_path)
    assert (load(again, 0, 1, 2, 3), load(again, 4, 5), again.counters.verify_failures.total()) == (4, 2, 0)
    again.close()


def test_a_page_that_the_kernel_answers_with_an_input_output_error_is_dropped_and_the_others_return(
    tmp_path: Path,
) -> None:
    clock = Clock()
    tier = posix_tier(tmp_path, clock)
    assert store(tier, 0, 1, 2, 3) == 4
    with pytest.raises(TierFailed) as failed:
        while_refused("read", lambda: load(tier, 2, 3))
    assert isinstance(failed.value.__cause__, OSError)
    assert failed.value.__cause__.errno == errno.EIO
    assert (load(tier, 0), tier.present([page_of(0).id]), tier.counters.failures) == (0, 0, 1)
    used_bytes = tier.used_bytes()
    clock.now_s += 1.0
    assert (load(tier, 0, 1), load(tier, 2), load(tier, 3)) == (2, 0, 1)
    assert store(tier, 2) == 1
    assert (load(tier, 2), tier.used_bytes(), tier.counters.verify_failures.total()) == (1, used_bytes // 3 * 4, 0)
    tier.close()


def test_a_disk_that_answers_with_an_input_output_error_at_the_start_is_tried_again_and_then_has_its_pages(
    tmp_path: Path,
) -> None:
    before = posix_tier(tmp_path)
    assert store(before, 0, 1) == 2
    before.close()
    clock = Clock()
    tier = while_refused("read", lambda: posix_tier(tmp_path, clock))
    assert (tier.counters.failures, load(tier, 0), store(tier, 4)) == (1, 0, 0)
    clock.now_s += 1.0
    assert store(tier, 4) == 1
    assert (load(tier, 0, 1), load(tier, 4), tier.counters.verify_failures.total()) == (2, 1, 0)
    tier.close()


def test_a_probe_leaves_nothing_behind_and_tells_what_the_file_system_takes(tmp_path: Path) -> None:
    disk = PosixDisk(tmp_path)
    assert disk.alignment in (1, 4096)
    assert disk.sizes() == {}
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    disk.close()
