"""Owns the log of what the segments hold: lines that are appended as pages come and go, and now and then a new log that starts
with all that is there (a snapshot).

It only saves work: each record describes itself, and what the log does not know is read from the segments at the next start. So
lines of stored pages need no sync of their own; they are written after the records that they name were synced, so a line that can
be read is true. A line that cannot be read ends the log.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import xxhash

from kv_store.disk.device import Disk, File
from kv_store.disk.record import pack_page, unpack_page
from kv_store.page import Page

_NEW_SUFFIX = ".new"
_LINE = struct.Struct("<IQ")  # bytes of the body, its xxh3_64
_STORED = struct.Struct("<cQQd")  # kind, place, sequence, stored_s; then the page
_GONE = struct.Struct("<cQ")  # kind, place
_SEGMENT = struct.Struct("<cIQI")  # kind, number, first sequence, slots known
_BEGIN = struct.Struct("<c8sII")  # kind, magic, version, slots per segment
_MAGIC = b"pdskvidx"
_VERSION = 2


@dataclass(frozen=True, slots=True)
class Stored:
    """The page at `place`; whatever was there is not any more."""

    place: int
    sequence: int
    stored_s: float
    page: Page


@dataclass(frozen=True, slots=True)
class Gone:
    place: int


@dataclass(frozen=True, slots=True)
class SegmentKnown:
    """The first `slots` slots of a segment, in its use since `first_sequence`, hold nothing but what Stored lines say."""

    number: int
    first_sequence: int
    slots: int


Line: TypeAlias = Stored | Gone | SegmentKnown


class IndexLog:
    """One file. Its owner calls one method at a time. After an OSError only `rewrite` makes it usable again."""

    def __init__(self, disk: Disk, name: str, slots: int) -> None:
        self._disk = disk
        self._name = name
        self._begin = _framed(_BEGIN.pack(b"B", _MAGIC, _VERSION, slots))
        self._file: File | None = None
        self.size_bytes = 0

    def load(self) -> list[Line]:
        """All lines up to the first that cannot be read; what is behind them is cut off."""
        self._disk_remove(self._name + _NEW_SUFFIX)
        size_bytes = self._disk.sizes().get(self._name, 0)
        if not size_bytes:
            return []
        self._file = self._disk.open(self._name, "log")
        content = memoryview(bytearray(size_bytes))
        content = content[: self._file.read([content], 0)]
        if bytes(content[: len(self._begin)]) != self._begin:
            return []
        bodies = list(_bodies(content[len(self._begin) :]))
        self.size_bytes = len(self._begin) + sum(_LINE.size + len(body) for body in bodies)
        if self.size_bytes < size_bytes:
            self._file.resize(self.size_bytes)
            self._file.sync()
        return [_parsed(body) for body in bodies]

    def append(self, packed: bytes) -> None:
        """Not on disk before `sync`."""
        assert self._file is not None
        assert self.size_bytes
        self._file.write([memoryview(packed)], self.size_bytes)
        self.size_bytes += len(packed)

    def sync(self) -> None:
        assert self._file is not None
        self._file.sync()

    def rewrite(self, lines: Iterable[Line]) -> None:
        """A new log of `lines` takes the place of the old one, at once; on disk when it returns."""
        packed = self._begin + pack_lines(lines)
        new = self._disk.open(self._name + _NEW_SUFFIX, "log")
        try:
            new.resize(0)
            new.write([memoryview(packed)], 0)
            new.sync()
            self._disk.rename(self._name + _NEW_SUFFIX, self._name)
        except BaseException:
            new.close()
            raise
        self.close()
        self._file, self.size_bytes = new, len(packed)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _disk_remove(self, name: str) -> None:
        if name in self._disk.sizes():
            self._disk.remove(name)


def pack_lines(lines: Iterable[Line]) -> bytes:
    return b"".join(_framed(_packed(line)) for line in lines)


def _framed(body: bytes) -> bytes:
    return _LINE.pack(len(body), xxhash.xxh3_64_intdigest(body)) + body


def _bodies(content: memoryview) -> Iterator[bytes]:
    start = 0
    while start + _LINE.size <= len(content):
        size_bytes, checksum = _LINE.unpack_from(content, start)
        body = bytes(content[start + _LINE.size : start + _LINE.size + size_bytes])
        if not body or len(body) < size_bytes or xxhash.xxh3_64_intdigest(body) != checksum:
            return
        yield body
        start += _LINE.size + size_bytes


def _packed(line: Line) -> bytes:
    match line:
        case Stored():
            return _STORED.pack(b"S", line.place, line.sequence, line.stored_s) + pack_page(line.page)
        case Gone():
            return _GONE.pack(b"G", line.place)
        case SegmentKnown():
            return _SEGMENT.pack(b"K", line.number, line.first_sequence, line.slots)


def _parsed(body: bytes) -> Line:
    """Of a body whose checksum was right."""
    match body[:1]:
        case b"S":
            _, place, sequence, stored_s = _STORED.unpack_from(body)
            return Stored(place, sequence, stored_s, unpack_page(body[_STORED.size :]))
        case b"G":
            return Gone(_GONE.unpack(body)[1])
        case _:
            _, number, first_sequence, slots = _SEGMENT.unpack(body)
            return SegmentKnown(number, first_sequence, slots)
