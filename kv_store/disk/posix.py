"""Owns the real directory under a disk tier: its lock, O_DIRECT after a probe, and positional I/O in full."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from kv_store.disk.device import Access, Mount
from kv_store.disk.layout import BLOCK_BYTES

_LOCK_NAME = "lock"
_PROBE_NAME = "probe"
_VECTORS_MOST = 1024  # IOV_MAX
_DIRECT = getattr(os, "O_DIRECT", 0)


class PosixFile:
    """Implements kv_store.disk.device.File. cached: its bytes stay in the page cache."""

    def __init__(self, descriptor: int, cached: bool) -> None:
        self._descriptor = descriptor
        self._cached = cached

    def read(self, into: Sequence[memoryview], offset: int) -> int:
        start = offset
        left = [part for part in into if len(part)]
        while left:
            count = os.preadv(self._descriptor, left[:_VECTORS_MOST], offset)
            offset += count
            if not count:
                break
            left = _after(left, count)
        self._forget(start, offset - start)
        return offset - start

    def write(self, parts: Sequence[memoryview], offset: int) -> None:
        left = [part for part in parts if len(part)]
        while left:
            count = os.pwritev(self._descriptor, left[:_VECTORS_MOST], offset)
            offset += count
            left = _after(left, count)

    def resize(self, size_bytes: int) -> None:
        os.ftruncate(self._descriptor, size_bytes)
        if size_bytes:
            os.posix_fallocate(self._descriptor, 0, size_bytes)

    def sync(self) -> None:
        os.fdatasync(self._descriptor)
        self._forget(0, 0)

    def close(self) -> None:
        os.close(self._descriptor)

    def _forget(self, offset: int, size_bytes: int) -> None:
        """The tier above holds what is used often: a second copy in the page cache would push out other programs' files."""
        if not self._cached:
            os.posix_fadvise(self._descriptor, offset, size_bytes, os.POSIX_FADV_DONTNEED)


class PosixDisk:
    """Implements kv_store.disk.device.Disk. Raises BlockingIOError where another process owns `root`."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = root
        self._lock = os.open(root / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._flags = _DIRECT if _takes_direct(root) else 0
        except BaseException:
            os.close(self._lock)
            raise
        self.alignment = BLOCK_BYTES if self._flags else 1

    def open(self, name: str, access: Access) -> PosixFile:
        path = self._root / name
        path.parent.mkdir(exist_ok=True)
        created = not path.exists()
        flags = self._flags if access == "segment" else 0
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
        if created:
            self._sync_names(path.parent)
        return PosixFile(descriptor, cached=access == "log")

    def sizes(self) -> dict[str, int]:
        paths = (path for path in self._root.glob("*/*") if path.is_file())
        return {str(path.relative_to(self._root)): path.stat().st_size for path in paths}

    def rename(self, name: str, to: str) -> None:
        (self._root / name).rename(self._root / to)
        self._sync_names((self._root / to).parent)

    def remove(self, name: str) -> None:
        (self._root / name).unlink()
        self._sync_names((self._root / name).parent)

    def close(self) -> None:
        os.close(self._lock)

    def _sync_names(self, folder: Path) -> None:
        for each in (folder, self._root):
            descriptor = os.open(each, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def posix_mount(root: Path) -> Mount:
    """For a tier that has `root`, a directory of its own."""

    def mount() -> PosixDisk:
        return PosixDisk(root)

    return mount


def _takes_direct(root: Path) -> bool:
    """Whether a block goes to the disk and back past the page cache there. Raises OSError where nothing can be written at all."""
    path = root / _PROBE_NAME
    block = mmap.mmap(-1, BLOCK_BYTES)
    wanted = os.urandom(BLOCK_BYTES)
    block[:] = wanted
    path.write_bytes(wanted)
    try:
        return _DIRECT != 0 and _went_around(path, block) and bytes(block) == wanted
    except OSError:
        return False
    finally:
        path.unlink()


def _went_around(path: Path, block: mmap.mmap) -> bool:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | _DIRECT)
    try:
        os.pwritev(descriptor, [block], 0)
        block[:] = bytes(BLOCK_BYTES)
        return os.preadv(descriptor, [block], 0) == BLOCK_BYTES
    finally:
        os.close(descriptor)


def _after(parts: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of `parts` behind the first `count` bytes."""
    for ordinal, part in enumerate(parts):
        if count < len(part):
            return [part[count:], *parts[ordinal + 1 :]]
        count -= len(part)
    return []
