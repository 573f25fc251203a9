"""Owns what the disk tier needs of a disk: the one seam through which all its file I/O goes.

Implementations: kv_store.disk.posix (the real one) and the twin of the tests, which crashes, tears, loses and fails.
All methods raise OSError. `sync` is the only promise: what was written before it is there after a crash, what was not may be
there, in part, in any order. Names and removals are on disk when the call returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

# segment: aligned I/O past the page cache where the file system allows it. log: small appends.
Access = Literal["segment", "log"]


class File(Protocol):
    """Offsets, sizes and memory of a file with access "segment" are multiples of 4096, where `Disk.alignment` says so."""

    def read(self, into: Sequence[memoryview], offset: int) -> int:
        """Fills `into` from `offset` on; how many bytes there were."""

    def write(self, parts: Sequence[memoryview], offset: int) -> None:
        """Writes all of `parts`, one after the other."""

    def resize(self, size_bytes: int) -> None:
        """Makes the file that long, its space allocated: what is added reads as zeros."""

    def sync(self) -> None: ...

    def close(self) -> None: ...


class Disk(Protocol):
    """A directory that this process owns alone until `close`. Names may have one "/"."""

    alignment: int  # of memory and sizes for access "segment"; 1 = anything goes

    def open(self, name: str, access: Access) -> File:
        """Creates the file where there is none."""

    def sizes(self) -> dict[str, int]:
        """Of all files, by name."""

    def rename(self, name: str, to: str) -> None:
        """Replaces `to`."""

    def remove(self, name: str) -> None: ...

    def close(self) -> None: ...


Mount = Callable[[], Disk]
