"""Owns the in-memory twin of kv_store.disk.posix: it crashes at a chosen operation, keeps what a real disk might keep of what was
not synced, and fails with the errors, or hangs in the operation, that it is told."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from kv_store.disk.device import Access

Operation = Literal["open", "read", "write", "resize", "sync", "rename", "remove"]
# What is left of unsynced writes: nothing; all (the process died, the machine did not); whole writes in any order; pieces of them.
Survival = Literal["nothing", "all", "writes", "sectors", "blocks"]
SURVIVALS: tuple[Survival, ...] = ("nothing", "all", "writes", "sectors", "blocks")
_HANG_S = 120.0
_PIECE_BYTES = {"sectors": 512, "blocks": 4096}


class Crash(BaseException):
    """The machine stopped here. Not an Exception: no handler of the product may take it for an error."""


@dataclass(slots=True)
class Content:
    """now: what reads see. durable: what was synced. unsynced: since then, in order; a resize has no bytes. bad: blocks of 4096
    that cannot be read."""

    now: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    unsynced: list[tuple[int, bytes | None]] = field(default_factory=list)
    bad: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Hang:
    """An operation that does not end before it is let go."""

    operation: Operation
    entered: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)

    def __call__(self, operation: Operation) -> None:
        if operation == self.operation:
            self.entered.set()
            assert self.let_go.wait(_HANG_S), "nobody let it go"


class MemoryDisk:
    """Implements kv_store.disk.device.Disk. crash_at: ordinal of the changing operation that does not end any more."""

    def __init__(self, files: dict[str, Content] | None = None, alignment: int = 1, crash_at: int = -1) -> None:
        self.alignment = alignment
        self.files = files if files is not None else {}
        self.faults: dict[Operation, int] = {}  # errno by operation, until removed
        self.hang: Hang | None = None
        self.operations = 0
        self.peak_bytes = 0
        self.crashed = False
        self._crash_at = crash_at

    def open(self, name: str, access: Access) -> MemoryFile:
        self.enter("open")
        if name not in self.files and not self.step():
            self.files[name] = Content()
        self.check()
        return MemoryFile(self, self.files[name], self.alignment if access == "segment" else 1)

    def sizes(self) -> dict[str, int]:
        self.check()
        return {name: len(content.now) for name, content in self.files.items()}

    def rename(self, name: str, to: str) -> None:
        self.enter("rename")
        lost = self.step()
        if not lost or self.operations % 2:
            self.files[to] = self.files.pop(name)
        self.check()

    def remove(self, name: str) -> None:
        self.enter("remove")
        if not self.step() or self.operations % 2:
            del self.files[name]
        self.check()

    def close(self) -> None:
        self.check()

    # ---- crashes and faults

    def enter(self, operation: Operation) -> None:
        self.check()
        if self.hang is not None:
            self.hang(operation)
        if operation in self.faults:
            raise OSError(self.faults[operation], os.strerror(self.faults[operation]))

    def check(self) -> None:
        if self.crashed:
            raise Crash

    def step(self) -> bool:
        """Whether the machine stops in this operation."""
        self.crashed = self.operations == self._crash_at
        self.operations += 1
        return self.crashed

    def grown(self) -> None:
        self.peak_bytes = max(self.peak_bytes, sum(len(content.now) for content in self.files.values()))

    def after_crash(self, rng: random.Random, survival: Survival, crash_at: int = -1) -> MemoryDisk:
        """The disk that the next start finds."""
        files = {name: _survivor(content, rng, survival) for name, content in self.files.items()}
        return MemoryDisk(files, self.alignment, crash_at)


class MemoryFile:
    """Implements kv_store.disk.device.File."""

    def __init__(self, disk: MemoryDisk, content: Content, alignment: int) -> None:
        self._disk = disk
        self._content = content
        self._alignment = alignment

    def read(self, into: Sequence[memoryview], offset: int) -> int:
        self._disk.enter("read")
        self._check_alignment(into, offset)
        start, end = offset, offset + sum(map(len, into))
        if self._content.bad.intersection(range(start // 4096, -(-end // 4096))):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        for part in into:
            found = self._content.now[offset : offset + len(part)]
            part[: len(found)] = found
            offset += len(found)
        return offset - start

    def write(self, parts: Sequence[memoryview], offset: int) -> None:
        self._check_alignment(parts, offset)
        data = b"".join(parts)
        try:
            self._disk.enter("write")
        except OSError:
            self._put(offset, data[: len(data) // 2])
            raise
        self._disk.step()
        self._put(offset, data)
        self._disk.grown()
        self._disk.check()

    def _put(self, offset: int, data: bytes) -> None:
        self._content.unsynced.append((offset, data))
        _apply(self._content.now, offset, data)

    def resize(self, size_bytes: int) -> None:
        self._disk.enter("resize")
        self._disk.step()
        self._content.unsynced.append((size_bytes, None))
        _apply(self._content.now, size_bytes, None)
        self._disk.grown()
        self._disk.check()

    def sync(self) -> None:
        """Where it fails, what was not synced is lost for good, though it can be read until the end: so does Linux."""
        content = self._content
        try:
            self._disk.enter("sync")
        except OSError:
            content.unsynced.clear()
            raise
        if not self._disk.step():
            for offset, data in content.unsynced:
                _apply(content.durable, offset, data)
            content.unsynced.clear()
        self._disk.check()

    def close(self) -> None:
        self._disk.check()

    def _check_alignment(self, parts: Sequence[memoryview], offset: int) -> None:
        if self._alignment > 1:
            addresses = [np.frombuffer(part, dtype=np.uint8).ctypes.data for part in parts]
            assert not any(value % self._alignment for value in (offset, *map(len, parts), *addresses))


def _apply(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del content[offset:]
        content.extend(bytes(offset - len(content)))
        return
    content.extend(bytes(max(0, offset - len(content))))
    content[offset : offset + len(data)] = data


def _survivor(content: Content, rng: random.Random, survival: Survival) -> Content:
    left = bytearray(content.durable)
    share = rng.random()
    for offset, data in content.unsynced:
        if survival == "nothing":
            continue
        size_bytes = _PIECE_BYTES.get(survival, len(data or b"") or 1)
        for start in range(0, len(data), size_bytes) if data is not None else (0,):
            if survival == "all" or rng.random() < share:
                _apply(left, offset + start, None if data is None else data[start : start + size_bytes])
    return Content(left, bytearray(left))
