"""Owns the segment files: their headers, and records in and out of them, verified.

A record is written payload first, then header; what makes it count is `sync` and, after that, the index. A segment's header says
from which sequence on its records count: whatever an earlier use of the file left behind is older.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import xxhash

from kv_store.disk.buffers import Buffers
from kv_store.disk.device import Disk, File
from kv_store.disk.layout import BLOCK_BYTES, Layout
from kv_store.disk.record import Record, header_failure, pack_header, payload_hash, unpack_header
from kv_store.page import FORMAT_DIGEST_BYTES, Page, PageBytes, PageId
from kv_store.tier import VerifyFailure

_MAGIC = b"pdskvseg"
_READ_BUFFERS = 4
_CHECKSUM_BYTES = 8
# magic, version, format digest, number, bytes of the file, first sequence
_SEGMENT = struct.Struct(f"<8sH{FORMAT_DIGEST_BYTES}sIQQ")
_VERSION = 1


class SegmentLog:
    """Files are opened when they are first used. Reads may run beside one writer and each other."""

    def __init__(self, disk: Disk, layout: Layout, format_digest: bytes) -> None:
        self._disk = disk
        self._layout = layout
        self._format_digest = format_digest
        self._files: dict[int, File] = {}
        self._unsynced: set[int] = set()
        self._readers = Buffers(_READ_BUFFERS, layout.record_bytes)
        self._writers = Buffers(1, layout.record_bytes)

    @property
    def folder(self) -> str:
        return self._format_digest.hex()

    def name(self, number: int) -> str:
        return f"{self.folder}/segment-{number:04d}"

    # ---- segments

    def begin(self, number: int, first_sequence: int) -> None:
        """Makes the file one of no records; on disk when it returns."""
        file = self._file(number)
        file.resize(self._layout.segment_bytes)
        fields = (_MAGIC, _VERSION, self._format_digest, number, self._layout.segment_bytes, first_sequence)
        block = _SEGMENT.pack(*fields).ljust(BLOCK_BYTES - _CHECKSUM_BYTES, b"\0")
        with self._writers.taken() as buffer:
            buffer[:BLOCK_BYTES] = block + xxhash.xxh3_64_digest(block)
            file.write([buffer[:BLOCK_BYTES]], 0)
        file.sync()

    def first_sequence(self, number: int) -> int | VerifyFailure | None:
        """Of an existing file, or why it is not that segment; None for one that was never begun, or has another size because it
        is from another configuration."""
        with self._readers.taken() as buffer:
            block = buffer[:BLOCK_BYTES]
            count = self._file(number).read([block], 0)
            if not any(block[:count]):
                return None
            if count < BLOCK_BYTES:
                return "length"
            magic, version, digest, found, size_bytes, first = _SEGMENT.unpack_from(block)
            whole = xxhash.xxh3_64_digest(block[:-_CHECKSUM_BYTES]) == block[-_CHECKSUM_BYTES:]
        if magic != _MAGIC or version != _VERSION or not whole:
            return "header"
        if digest != self._format_digest or found != number:
            return "identity"
        return int(first) if size_bytes == self._layout.segment_bytes else None

    def remove(self, number: int) -> None:
        file = self._files.pop(number, None)
        if file is not None:
            file.close()
        self._disk.remove(self.name(number))

    # ---- records

    def write(self, place: int, page: Page, content: PageBytes, stored_s: float, sequence: int) -> None:
        """Not on disk before `sync`."""
        rows = _rows(content)
        with self._writers.taken() as buffer:
            parts = rows if self._aligned(content) else [self._staged(buffer, rows)]
            hashed = payload_hash(rows)
            record = Record(page, self._format_digest, self._layout.payload_bytes, hashed, stored_s, sequence)
            self._put(place, record, parts, buffer[: self._layout.header_bytes])

    def read(self, place: int, page_id: PageId, into: PageBytes) -> VerifyFailure | None:
        """Fills `into` and says why it may not be used; None where it is the page that was stored."""
        rows = _rows(into)
        in_place = self._aligned(into)
        with self._readers.taken() as buffer:
            header = buffer[: self._layout.header_bytes]
            payload = rows if in_place else [buffer[self._layout.header_bytes :]]
            count = self._file_of(place).read([header, *payload], self._offset(place))
            if count < self._layout.header_bytes + self._layout.payload_bytes:
                return "length"
            record = unpack_header(header)
            failure = header_failure(record, page_id, self._format_digest, self._layout.payload_bytes)
            if record is None or failure is not None:
                return failure
            parts = rows if in_place else [payload[0][: self._layout.payload_bytes]]
            if payload_hash(parts) != record.payload_hash:
                return "checksum"
            if not in_place:
                _scatter(parts[0], rows)
        return None

    def copy(self, place: int, to: int, page_id: PageId, sequence: int) -> VerifyFailure | None:
        """Writes the record at `place` once more, at `to`; why it was not copied. Not on disk before `sync`."""
        header_bytes = self._layout.header_bytes
        with self._writers.taken() as buffer:
            record = self._whole(place, buffer)
            failure = header_failure(record, page_id, self._format_digest, self._layout.payload_bytes)
            if record is None or failure is not None:
                return failure
            if payload_hash([self._payload(buffer)]) != record.payload_hash:
                return "checksum"
            fields = (record.page, record.format_digest, record.payload_bytes, record.payload_hash, record.stored_s)
            self._put(to, Record(*fields, sequence), [buffer[header_bytes:]], buffer[:header_bytes])
        return None

    def find(self, place: int, first_sequence: int) -> Record | None:
        """The record at `place` if there is one, all of it, from `first_sequence` on. For what the index log does not know."""
        with self._readers.taken() as buffer:
            record = self._whole(place, buffer)
            if record is None or record.sequence < first_sequence:
                return None
            page_id = record.page.id
            if header_failure(record, page_id, self._format_digest, self._layout.payload_bytes) is not None:
                return None
            return record if payload_hash([self._payload(buffer)]) == record.payload_hash else None

    def sync(self) -> None:
        """What was written since the last call is on disk. After a failure nothing of it counts: it is not tried again, since
        the kernel may have dropped what it could not write."""
        numbers, self._unsynced = self._unsynced, set()
        for number in sorted(numbers):
            self._files[number].sync()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    # ---- parts

    def _put(self, place: int, record: Record, payload: Sequence[memoryview], header: memoryview) -> None:
        file, offset = self._file_of(place), self._offset(place)
        self._unsynced.add(self._layout.segment_of(place))
        file.write(payload, offset + self._layout.header_bytes)
        header[:] = pack_header(record, self._layout.header_bytes)
        file.write([header], offset)

    def _whole(self, place: int, buffer: memoryview) -> Record | None:
        """Header and payload of `place` in `buffer`; the payload only where there is a header, None without one."""
        header_bytes = self._layout.header_bytes
        file, offset = self._file_of(place), self._offset(place)
        if file.read([buffer[:header_bytes]], offset) < header_bytes:
            return None
        record = unpack_header(buffer[:header_bytes])
        if record is None:
            return None
        count = file.read([buffer[header_bytes:]], offset + header_bytes)
        return record if count >= self._layout.payload_bytes else None

    def _payload(self, buffer: memoryview) -> memoryview:
        return buffer[self._layout.header_bytes :][: self._layout.payload_bytes]

    def _staged(self, buffer: memoryview, rows: Sequence[memoryview]) -> memoryview:
        """A copy of `rows` in the payload's part of `buffer`, its padding included."""
        start = end = self._layout.header_bytes
        for row in rows:
            buffer[end : end + len(row)] = row
            end += len(row)
        buffer[end:] = bytes(len(buffer) - end)
        return buffer[start:]

    def _aligned(self, content: PageBytes) -> bool:
        """Whether its rows can go to the disk and come from it as they lie in memory."""
        to = self._disk.alignment
        return to == 1 or not (content.ctypes.data % to or content.strides[0] % to or content.shape[1] % to)

    def _file_of(self, place: int) -> File:
        return self._file(self._layout.segment_of(place))

    def _offset(self, place: int) -> int:
        return self._layout.offset(self._layout.slot_of(place))

    def _file(self, number: int) -> File:
        file = self._files.get(number)
        if file is None:
            file = self._files[number] = self._disk.open(self.name(number), "segment")
        return file


def _rows(content: PageBytes) -> list[memoryview]:
    """The page's bytes as few pieces as they lie in."""
    if content.flags.c_contiguous:
        return [content.reshape(-1).data]
    return [row.data for row in content]


def _scatter(payload: memoryview, rows: Sequence[memoryview]) -> None:
    start = 0
    for row in rows:
        row[:] = payload[start : start + len(row)]
        start += len(row)
