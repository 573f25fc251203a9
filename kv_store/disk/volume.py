"""Owns a mounted directory: everything that is there only while the disk works, from the restart to the last sync."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from kv_store.disk.device import Disk
from kv_store.disk.index_log import IndexLog, pack_lines
from kv_store.disk.layout import Layout
from kv_store.disk.ledger import Pinned
from kv_store.disk.places import Places
from kv_store.disk.recovery import recover
from kv_store.disk.segment_log import SegmentLog
from kv_store.disk.writer import Writer
from kv_store.page import Page, PageBytes
from kv_store.tier import TierCounters, VerifyFailure

_INDEX_NAME = "index"


class Volume:
    """All methods raise OSError. Loads run beside each other and beside stores; stores wait for each other.

    A new one reads the whole directory; `places`, none of them taken so far, then hold what was found.
    """

    def __init__(
        self, disk: Disk, layout: Layout, format_digest: bytes, places: Places, counters: TierCounters, now_s: float
    ) -> None:
        self._disk = disk
        self._layout = layout
        self._places = places
        self._counters = counters
        self._log = SegmentLog(disk, layout, format_digest)
        self._index_log = IndexLog(disk, f"{self._log.folder}/{_INDEX_NAME}", layout.slots)
        self._writer = Writer(disk, self._log, places, layout, counters)
        self._closed = False
        self._stores = threading.Lock()
        self._index_log_lock = threading.Lock()
        try:
            found = recover(disk, self._log, layout, self._index_log.load())
        except BaseException:
            self._close_files()
            raise
        self._log_is_true = found.log_is_exact and self._index_log.size_bytes > 0
        counters.verify_failures += found.failures
        places.restore(found, now_s)

    @property
    def pages_moved(self) -> int:
        """By compaction, since the start."""
        return self._writer.pages_moved

    def store(self, pages: Sequence[Page], contents: Sequence[PageBytes], now_s: float) -> None:
        with self._stores:
            if not self._closed:
                self._writer.store(pages, contents, now_s)
        with self._index_log_lock:
            self._tell_log()

    def load(self, pinned: Sequence[Pinned], into: Sequence[PageBytes]) -> tuple[int, VerifyFailure | None]:
        """Pages of one run. How many, from the first on, are in `into` now, verified; and why the next one is not. Raises OSError
        where the first one cannot be read: one bad sector does not cost the pages before it."""
        try:
            return self._read(pinned, into)
        except OSError:
            if len(pinned) == 1:
                raise
        for at in range(len(pinned)):
            try:
                _, failure = self._read(pinned[at : at + 1], into[at : at + 1])
            except OSError:
                if not at:
                    raise
                return at, None
            if failure is not None:
                return at, failure
        return len(pinned), None

    def runs(self, pinned: Sequence[Pinned]) -> Iterator[slice]:
        """Cuts `pinned` into stretches that lie side by side on the disk."""
        start = 0
        for end in range(1, len(pinned) + 1):
            if end == len(pinned) or end - start == self._layout.run or not self._adjacent(*pinned[end - 1 : end + 1]):
                yield slice(start, end)
                start = end

    def settle(self) -> None:
        """What changed so far is known after any crash: what was removed stays so. Waits for a store under way: it may be copying
        a page that was removed meanwhile."""
        with self._stores, self._index_log_lock:
            self._tell_log()
            if self._closed:
                return
            self._log_is_true = False  # until what was appended is known to be on disk
            self._index_log.sync()
            self._log_is_true = True

    def close(self) -> None:
        """After the last load. What changed so far is known, if the disk still works."""
        try:
            self.settle()
        finally:
            with self._stores, self._index_log_lock:
                if not self._closed:
                    self._close_files()
                self._closed = True

    # ---- parts

    def _close_files(self) -> None:
        self._index_log.close()
        self._log.close()
        self._disk.close()

    def _read(self, pinned: Sequence[Pinned], into: Sequence[PageBytes]) -> tuple[int, VerifyFailure | None]:
        return self._log.read([each.place for each in pinned], [each.entry.page.id for each in pinned], into)

    def _adjacent(self, first: Pinned, second: Pinned) -> bool:
        same_segment = self._layout.segment_of(first.place) == self._layout.segment_of(second.place)
        return second.place == first.place + 1 and same_segment

    def _tell_log(self) -> None:
        """Writes down what changed. An index log that may lack something is replaced by a new one."""
        if self._closed:
            return
        packed = pack_lines(self._places.take_lines())
        fits = self._index_log.size_bytes + len(packed) <= self._layout.log_bytes
        was_true, self._log_is_true = self._log_is_true, False
        if was_true and fits:
            self._index_log.append(packed)
        else:
            self._index_log.rewrite(self._places.snapshot())
        self._log_is_true = True
