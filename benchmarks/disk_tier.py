"""The disk tier against plain pwrite and pread in the same directory, its CPU time, and how long a restart takes.

`python -m benchmarks.disk_tier [--full] [--folder DIR] [-o json]`. "plain" moves as many bytes in as large pieces, past the page cache
where the file system allows it, with as many fdatasync; it hashes, copies and remembers nothing. Rounds of both alternate.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.command import benchmark_parser, mode_of, publish
from benchmarks.report import Measurement, Mode, Result, compare, measure, result
from kv_store.disk.device import File
from kv_store.disk.disk_tier import DiskTier
from kv_store.disk.layout import DiskLimits
from kv_store.disk.posix import PosixDisk, posix_mount
from kv_store.lru import Lru
from kv_store.page import Page, PageBytes, PageFormat, PageId

BATCH_PAGES = 16  # one fdatasync each
MIB = 2**20
FORMATS = {
    "64 KiB": PageFormat(b"\x01" * 32, 16, 8, 8 * 1024),
    "1 MiB": PageFormat(b"\x02" * 32, 64, 16, 64 * 1024),
    "4 MiB": PageFormat(b"\x03" * 32, 256, 16, 256 * 1024),
}
ROUND_BYTES: dict[Mode, int] = {"quick": 256 * MIB, "full": 1024 * MIB}
ROUNDS: dict[Mode, int] = {"quick": 3, "full": 5}
READY_BYTES: dict[Mode, int] = {"quick": 1024 * MIB, "full": 10 * 1024 * MIB}
# What is measured, and what it is compared with.
KINDS = {"write": "pwrite + fdatasync", "read of chains": "pread", "read at random": "pread"}
READY_FORMATS = ("64 KiB", "1 MiB")


@dataclass(frozen=True, slots=True)
class Cost:
    """Of moving some bytes."""

    size_bytes: int
    wall_s: float
    cpu_s: float

    @property
    def gb_s(self) -> float:
        return self.size_bytes / self.wall_s / 1e9

    @property
    def cpu_s_per_gb(self) -> float:
        return self.cpu_s / self.size_bytes * 1e9


def cost_of(size_bytes: int, work: Callable[[], None]) -> Cost:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    return Cost(size_bytes, time.perf_counter() - wall_s, time.process_time() - cpu_s)


def page_of(number: int) -> Page:
    page_id = PageId(hashlib.sha256(number.to_bytes(8, "little")).digest(), number, number.to_bytes(4, "little") * 16)
    return Page(page_id, unit_keys=b"k" * 32)


def buffers_of(page_format: PageFormat) -> list[PageBytes]:
    """A batch of pages, aligned as the arena of a worker is; random bytes."""
    size_bytes = page_format.size_bytes
    memory = np.frombuffer(mmap.mmap(-1, BATCH_PAGES * size_bytes), dtype=np.uint8)
    memory[:] = np.frombuffer(random.Random(1).randbytes(len(memory)), dtype=np.uint8)
    shape = (BATCH_PAGES, page_format.layers, page_format.block_bytes)
    return list(memory.reshape(shape))


def tier_of(folder: Path, page_format: PageFormat, capacity_bytes: int) -> DiskTier:
    return DiskTier(posix_mount(folder), page_format, DiskLimits(capacity_bytes), Lru(), lambda change, pages: None)


def batches(numbers: Sequence[int]) -> list[Sequence[int]]:
    return [numbers[start : start + BATCH_PAGES] for start in range(0, len(numbers), BATCH_PAGES)]


def write_pages(tier: DiskTier, numbers: Sequence[int], contents: Sequence[PageBytes]) -> None:
    for batch in batches(numbers):
        assert tier.write([page_of(number) for number in batch], contents[: len(batch)]) == len(batch)


def read_pages(tier: DiskTier, numbers: Sequence[int], into: Sequence[PageBytes]) -> None:
    for batch in batches(numbers):
        assert tier.read([page_of(number).id for number in batch], into[: len(batch)]) == len(batch)


def plain_write(file: File, pages: int, contents: Sequence[PageBytes]) -> None:
    size_bytes = contents[0].nbytes
    for start in range(0, pages, BATCH_PAGES):
        for ordinal, content in enumerate(contents):
            file.write([content.reshape(-1).data], (start + ordinal) * size_bytes)
        file.sync()


def plain_read(file: File, numbers: Sequence[int], into: Sequence[PageBytes]) -> None:
    for ordinal, number in enumerate(numbers):
        target = into[ordinal % BATCH_PAGES]
        assert file.read([target.reshape(-1).data], number * target.nbytes) == target.nbytes


# ---- bandwidth


def bandwidth_part(name: str, folder: Path, mode: Mode) -> list[Measurement]:
    page_format = FORMATS[name]
    round_bytes = ROUND_BYTES[mode]
    pages = round_bytes // page_format.size_bytes
    contents = buffers_of(page_format)
    costs: dict[str, list[Cost]] = {f"{whose}{kind}": [] for kind in KINDS for whose in ("", "plain ")}
    disk = PosixDisk(folder / "plain")
    file = disk.open("plain/file", "segment")
    file.resize(round_bytes)
    tier = tier_of(folder / "tier", page_format, round_bytes * 2)
    for round_number in range(ROUNDS[mode] + 1):
        numbers = range(round_number * pages, (round_number + 1) * pages)
        costs["write"].append(cost_of(round_bytes, lambda numbers=numbers: write_pages(tier, numbers, contents)))  # type: ignore[misc]
        costs["plain write"].append(cost_of(round_bytes, lambda: plain_write(file, pages, contents)))
        orders = {"read of chains": list(range(pages)), "read at random": random.Random(1).sample(range(pages), pages)}
        for kind, order in orders.items():
            stored = [numbers[at] for at in order]
            costs[kind].append(cost_of(round_bytes, lambda stored=stored: read_pages(tier, stored, contents)))  # type: ignore[misc]
            costs[f"plain {kind}"].append(cost_of(round_bytes, lambda order=order: plain_read(file, order, contents)))  # type: ignore[misc]
        tier.remove([page_of(number).id.key for number in numbers])  # the next round uses the same segments again
    tier.close()
    file.close()
    disk.remove("plain/file")
    disk.close()
    return _figures(name, {kind: found[1:] for kind, found in costs.items()})  # the first round allocates


def _figures(name: str, costs: dict[str, list[Cost]]) -> list[Measurement]:
    figures: list[Measurement] = []
    for kind, plain in KINDS.items():
        ours, theirs = costs[kind], costs[f"plain {kind}"]
        rates, plain_rates = [each.gb_s for each in ours], [each.gb_s for each in theirs]
        cpu, plain_cpu = [each.cpu_s_per_gb for each in ours], [each.cpu_s_per_gb for each in theirs]
        figures.append(compare(f"{kind}, pages of {name}", "GB/s", rates, (plain, plain_rates), "higher"))
        figures.append(compare(f"{kind}, pages of {name}: CPU", "CPU-s/GB", cpu, (plain, plain_cpu), "lower"))
    return figures


# ---- restart


def ready_part(name: str, folder: Path, mode: Mode) -> list[Measurement]:
    page_format, size_bytes = FORMATS[name], READY_BYTES[mode]
    pages = size_bytes // page_format.size_bytes
    tier = tier_of(folder, page_format, size_bytes * 3 // 2)
    write_pages(tier, range(pages), buffers_of(page_format))
    tier.close()
    index = next(folder.glob("*/index"))
    label = f"restart until {size_bytes / 2**30:.0f} GiB on disk can be served, pages of {name}"
    with_log = [_ready_s(folder, page_format, size_bytes, index) for _ in range(ROUNDS[mode])]
    index.unlink()
    without = _ready_s(folder, page_format, size_bytes, None)
    return [measure(label, "s", with_log), measure(f"{label}, index log lost: every header is read", "s", [without])]


def _ready_s(folder: Path, page_format: PageFormat, size_bytes: int, index: Path | None) -> float:
    """From nothing to a tier that finds all pages; the index log is not in the page cache."""
    if index is not None:
        descriptor = os.open(index, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    pages = size_bytes // page_format.size_bytes
    start_s = time.perf_counter()
    tier = tier_of(folder, page_format, size_bytes * 3 // 2)
    seconds = time.perf_counter() - start_s
    assert len(tier.entries()) == pages
    tier.close()
    return seconds


def run(mode: Mode, folder: Path) -> Result:
    measurements: list[Measurement] = []
    for name in FORMATS:
        with tempfile.TemporaryDirectory(dir=folder) as each:
            measurements += bandwidth_part(name, Path(each), mode)
    for name in READY_FORMATS:
        with tempfile.TemporaryDirectory(dir=folder) as each:
            measurements += ready_part(name, Path(each), mode)
    with tempfile.TemporaryDirectory(dir=folder) as each:
        disk = PosixDisk(Path(each))
        direct = disk.alignment > 1
        disk.close()
    settings: dict[str, str | int | float | bool] = {"batch_pages": BATCH_PAGES, "direct": direct, "threads": 1}
    notes = [
        "plain moves the same bytes in pieces of one page, without headers, checksums and index; ratio above 1 = faster or cheaper",
        "chains are read as they were written, 16 pages per call; the virtual disk's own cache is not emptied between rounds",
        "segments and the plain file are written once before they are measured",
    ]
    return result("disk_tier", mode, settings, measurements, notes=notes)


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("The disk tier against plain file I/O, and its restart.")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    given = parser.parse_args(arguments)
    publish(run(mode_of(given), given.folder or Path(tempfile.gettempdir())))


if __name__ == "__main__":
    main()
