"""Owns records that wait for their one write: at adjacent places of one segment, each a payload and the header behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kv_store.disk.buffers import Buffers
from kv_store.disk.layout import Layout
from kv_store.disk.record import Record, pack_header


class RecordRun:
    """`Layout.run` records at most. Their payloads are not copied: they must stay as they are until they are written."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._headers = Buffers(1, layout.run * layout.header_bytes)
        self._records: list[tuple[int, Record, Sequence[memoryview]]] = []
        self._next: int | None = None  # the place that can be written together with those that wait

    def __bool__(self) -> bool:
        return bool(self._records)

    @property
    def first(self) -> int:
        """The place of its first record."""
        return self._records[0][0]

    def takes(self, place: int) -> bool:
        """Whether a record at `place` can be written together with those that wait."""
        return not self._records or place == self._next

    def add(self, place: int, record: Record, payload: Sequence[memoryview]) -> None:
        """`payload`: with its padding."""
        assert self.takes(place)
        self._records.append((place, record, payload))
        ends = len(self._records) == self._layout.run or self._layout.slot_of(place) == self._layout.slots - 1
        self._next = None if ends else place + 1

    def discard(self) -> None:
        self._records = []

    @contextmanager
    def taken(self) -> Iterator[list[memoryview]]:
        """What to write from `first` on, in one call. None of it waits any longer, whether that succeeds or not."""
        records, self._records = self._records, []
        header_bytes = self._layout.header_bytes
        with self._headers.taken() as buffer:
            parts: list[memoryview] = []
            for at, (_, record, payload) in enumerate(records):
                header = buffer[at * header_bytes :][:header_bytes]
                pack_header(record, header)
                parts += [*payload, header]
            yield parts
