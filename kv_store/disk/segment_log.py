"""Owns the segment files: their headers, and records in and out of them, verified.

A record is written payload first, then header; what makes it count is `sync` and, after that, the index. Adjacent records go in one
call, in that order still, since a header lies behind its payload. A segment's header says from which sequence on its records count:
whatever an earlier use of the file left behind is older.
"""

from __future__ import annotations

from collections.abc import Sequence

from kv_store.disk.buffers import Buffers
from kv_store.disk.device import Disk, File
from kv_store.disk.layout import BLOCK_BYTES, Layout
from kv_store.disk.record import Record, header_failure, payload_hash, unpack_header
from kv_store.disk.record_run import RecordRun
from kv_store.disk.segment_header import SegmentHeader, pack_segment, unpack_segment
from kv_store.page import Page, PageBytes, PageId
from kv_store.tier import VerifyFailure

_READ_BUFFERS = 4


class SegmentLog:
    """Files are opened when they are first used. Reads may run beside one writer and each other."""

    def __init__(self, disk: Disk, layout: Layout, format_digest: bytes) -> None:
        self._disk = disk
        self._layout = layout
        self._format_digest = format_digest
        self._files: dict[int, File] = {}
        self._unsynced: set[int] = set()
        self._readers = Buffers(_READ_BUFFERS, layout.record_bytes + (layout.run - 1) * layout.header_bytes)
        self._staging = Buffers(1, layout.record_bytes)
        self._padding = memoryview(bytes(layout.padded_bytes - layout.payload_bytes))
        self._run = RecordRun(layout)

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
        header = SegmentHeader(self._format_digest, number, self._layout.segment_bytes, first_sequence)
        with self._staging.taken() as buffer:
            buffer[:BLOCK_BYTES] = pack_segment(header)
            file.write([buffer[:BLOCK_BYTES]], 0)
        file.sync()

    def first_sequence(self, number: int) -> int | VerifyFailure | None:
        """Of an existing file, or why it is not that segment; None for one that was never begun, or has another size because it
        is from another configuration."""
        with self._readers.taken() as buffer:
            block = buffer[:BLOCK_BYTES]
            header = unpack_segment(block[: self._file(number).read([block], 0)])
        if not isinstance(header, SegmentHeader):
            return header
        if header.format_digest != self._format_digest or header.number != number:
            return "identity"
        return header.first_sequence if header.segment_bytes == self._layout.segment_bytes else None

    def remove(self, number: int) -> None:
        file = self._files.pop(number, None)
        if file is not None:
            file.close()
        self._disk.remove(self.name(number))

    # ---- records

    def write(self, place: int, page: Page, content: PageBytes, stored_s: float, sequence: int) -> None:
        """Not on disk before `sync`, until when `content` must stay as it is."""
        rows = _rows(content)
        record = Record(page, self._format_digest, self._layout.payload_bytes, payload_hash(rows), stored_s, sequence)
        if not self._aligned(content):
            self._write_run()
            with self._staging.taken() as buffer:
                self._run.add(place, record, [self._staged(buffer, rows)])
                self._write_run()
            return
        if not self._run.takes(place):
            self._write_run()
        self._run.add(place, record, [*rows, self._padding] if self._padding else rows)

    def discard(self) -> None:
        """What was not written yet never will be."""
        self._run.discard()

    def read(
        self, places: Sequence[int], ids: Sequence[PageId], into: Sequence[PageBytes]
    ) -> tuple[int, VerifyFailure | None]:
        """Fills `into` with the records at adjacent places, `Layout.run` of them at most. How many, from the first on, are the
        pages that were stored, and why the next one is not."""
        size_bytes, header_bytes = self._layout.padded_bytes, self._layout.header_bytes
        in_place = all(map(self._aligned, into))
        if not in_place and len(places) > 1:
            return self._read_singly(places, ids, into)
        with self._readers.taken() as buffer:
            headers = [buffer[at * header_bytes :][:header_bytes] for at in range(len(places))]
            payloads = [_rows(each) for each in into]
            if not in_place:
                payloads = [[buffer[header_bytes:][:size_bytes]]]
            parts = self._interleaved(payloads, headers) if in_place else [payloads[0][0], headers[0]]
            count = self._file_of(places[0]).read(parts, self._offset(places[0]))
            for at, page_id in enumerate(ids):
                if count < (at + 1) * self._layout.record_bytes:
                    return at, "length"
                payload = payloads[at] if in_place else [payloads[0][0][: self._layout.payload_bytes]]
                failure = self._failure(headers[at], page_id, payload)
                if failure is not None:
                    return at, failure
                if not in_place:
                    _scatter(payload[0], _rows(into[at]))
        return len(places), None

    def copy(self, place: int, to: int, page_id: PageId, sequence: int) -> VerifyFailure | None:
        """Writes the record at `place` once more, at `to`; why it was not copied. Not on disk before `sync`."""
        self._write_run()
        with self._staging.taken() as buffer:
            record = self._whole(place, buffer)
            payload = buffer[: self._layout.payload_bytes]
            failure = self._failure(buffer[self._layout.padded_bytes :], page_id, [payload])
            if record is None or failure is not None:
                return failure or "header"
            fields = (record.page, record.format_digest, record.payload_bytes, record.payload_hash, record.stored_s)
            self._run.add(to, Record(*fields, sequence), [buffer[: self._layout.padded_bytes]])
            self._write_run()
        return None

    def find(self, place: int, first_sequence: int) -> Record | None:
        """The record at `place` if there is one, all of it, from `first_sequence` on. For what the index log does not know."""
        with self._readers.taken() as buffer:
            record = self._whole(place, buffer)
            if record is None or record.sequence < first_sequence:
                return None
            header, payload = buffer[self._layout.padded_bytes :], buffer[: self._layout.payload_bytes]
            return record if self._failure(header, record.page.id, [payload]) is None else None

    def sync(self) -> None:
        """What was written since the last call is on disk. After a failure nothing of it counts: it is not tried again, since
        the kernel may have dropped what it could not write."""
        self._write_run()
        numbers, self._unsynced = self._unsynced, set()
        for number in sorted(numbers):
            self._files[number].sync()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    # ---- parts

    def _write_run(self) -> None:
        if not self._run:
            return
        first = self._run.first
        self._unsynced.add(self._layout.segment_of(first))
        with self._run.taken() as parts:
            self._file_of(first).write(parts, self._offset(first))

    def _read_singly(
        self, places: Sequence[int], ids: Sequence[PageId], into: Sequence[PageBytes]
    ) -> tuple[int, VerifyFailure | None]:
        for at in range(len(places)):
            _, failure = self.read(places[at : at + 1], ids[at : at + 1], into[at : at + 1])
            if failure is not None:
                return at, failure
        return len(places), None

    def _interleaved(self, payloads: Sequence[Sequence[memoryview]], headers: Sequence[memoryview]) -> list[memoryview]:
        """Where the bytes of adjacent records go. Padding is read into nowhere."""
        nowhere = memoryview(bytearray(len(self._padding)))
        return [part for payload, header in zip(payloads, headers, strict=True) for part in (*payload, nowhere, header)]

    def _failure(self, header: memoryview, page_id: PageId, payload: Sequence[memoryview]) -> VerifyFailure | None:
        record = unpack_header(header[: self._layout.header_bytes])
        failure = header_failure(record, page_id, self._format_digest, self._layout.payload_bytes)
        if record is None or failure is not None:
            return failure
        return None if payload_hash(payload) == record.payload_hash else "checksum"

    def _whole(self, place: int, buffer: memoryview) -> Record | None:
        """The record of `place` in `buffer`, all of it where there is a header; None without one."""
        start, file, offset = self._layout.padded_bytes, self._file_of(place), self._offset(place)
        header = buffer[start : self._layout.record_bytes]
        if file.read([header], offset + start) < len(header):
            return None
        record = unpack_header(header)
        return record if record is not None and file.read([buffer[:start]], offset) == start else None

    def _staged(self, buffer: memoryview, rows: Sequence[memoryview]) -> memoryview:
        """A copy of `rows` in `buffer`, padded."""
        end = 0
        for row in rows:
            buffer[end : end + len(row)] = row
            end += len(row)
        buffer[end : self._layout.padded_bytes] = self._padding
        return buffer[: self._layout.padded_bytes]

    def _aligned(self, content: PageBytes) -> bool:
        """Whether its rows can go to the disk and come from it as they lie in memory."""
        to = self._disk.alignment
        if to == 1:
            return True
        address: int = content.__array_interface__["data"][0]  # half as dear as `ctypes.data`
        return not (address % to or content.strides[0] % to or content.shape[1] % to)

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
