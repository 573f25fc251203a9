"""Owns the disk tier: pages in the segments of one directory, off for a while whenever the disk fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from kv_store.backoff import Backoff
from kv_store.disk.device import Mount
from kv_store.disk.layout import DiskLimits, layout_of
from kv_store.disk.ledger import Ledger, Pinned
from kv_store.disk.places import Places
from kv_store.disk.shelf import Shelf
from kv_store.disk.volume import Volume
from kv_store.eviction import EvictionPolicy
from kv_store.inspection import Finding, Occupancy, PageRow, entry_rows
from kv_store.news import News
from kv_store.page import Page, PageBytes, PageFormat, PageId
from kv_store.tier import TierCounters, TierFailed, TierListener
from kv_store.tier_index import Entry, TierIndex
from service_kit.logs import get_logger

_log = get_logger(__name__)


class DiskTier:
    """Implements kv_store.tier.PageTier.

    A disk that fails is left alone for a time that doubles, loads and stores each by themselves: what cannot be written to (full,
    read-only) can often still be read. The call that fails raises TierFailed, those in the pause find and store nothing, the first
    one after it tries again. A directory that cannot be opened at the start is tried again by a `write` in the same way.
    """

    name = "disk"

    def __init__(
        self,
        mount: Mount,
        page_format: PageFormat,
        limits: DiskLimits,
        policy: EvictionPolicy,
        listener: TierListener,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """clock: wall clock, since pages outlive the process. Raises ConfigInvalid where the capacity is too small."""
        self.counters = TierCounters()
        self._mount = mount
        self._format = page_format
        self._layout = layout_of(page_format, limits)
        self._clock = clock
        index = TierIndex(self._layout.records * self._layout.record_bytes, policy, limits.ttl_s, limits.tenant_bytes)
        index.count_in(self.counters.verify_failures)
        ledger = Ledger(self._layout, index, self.counters)
        self._shelf = Shelf(ledger)
        self._places = Places(ledger)
        self._news = News(self._shelf.take_news, listener)
        self._loads = Backoff()
        self._stores = Backoff()
        self._mounting = threading.Lock()
        self._volume: Volume | None = None
        self._closed = False
        with suppress(TierFailed), self._guarded(self._stores):
            self._mounted()
        self._news.tell()

    @property
    def pages_moved(self) -> int:
        """By compaction, since the start."""
        return self._volume.pages_moved if self._volume is not None else 0

    def present(self, ids: Sequence[PageId]) -> int:
        now_s = self._clock()
        return 0 if self._loads.off(now_s) else self._shelf.present(ids, now_s)

    def read(self, ids: Sequence[PageId], into: Sequence[PageBytes]) -> int:
        now_s, started_s = self._clock(), time.perf_counter()
        good = 0
        pinned = [] if self._loads.off(now_s) else self._shelf.pin(ids, now_s)
        try:
            for run in self._volume.runs(pinned) if self._volume is not None else ():
                good += self._read_run(pinned[run], into[run])
                if good < run.stop:
                    break
        finally:
            self._shelf.unpin(pinned)
            self._count_read(good, len(ids) - good, time.perf_counter() - started_s)
            self._news.tell()
        return good

    def write(self, pages: Sequence[Page], contents: Sequence[PageBytes]) -> int:
        now_s, started_s = self._clock(), time.perf_counter()
        try:
            if not self._closed and not self._stores.off(now_s):
                with self._guarded(self._stores):
                    volume = self._mounted()
                    self._shelf.expire(now_s)
                    volume.store(pages, contents, now_s)
        finally:
            here = self._shelf.here(pages, now_s)
            self.counters.dropped += len(pages) - here
            self.counters.write_s += time.perf_counter() - started_s
            self._news.tell()
        return here

    def remove(self, keys: Sequence[bytes]) -> int:
        """Once it returns, no restart brings them back, those neither that were evicted before. Raises TierFailed where that cannot
        be promised."""
        removed = self._shelf.remove(keys)
        try:
            if self._volume is not None:
                with self._guarded(self._stores):
                    self._volume.settle()
        finally:
            self._news.tell()
        return removed

    def expire(self) -> None:
        """Drops pages that outlived their time."""
        self._shelf.expire(self._clock())
        self._news.tell()

    def used_bytes(self) -> int:
        """Of the records of all pages that can be found, or are still being read; whole blocks, headers included."""
        return self._shelf.used_bytes()

    def entries(self) -> list[Entry]:
        return self._shelf.entries()

    def hold(self, key: bytes, seconds: float) -> bool:
        """Keeps a page for so long, whatever the policy says. False if it is not here."""
        return self._shelf.hold(key, self._clock() + seconds)

    def occupancy(self) -> Occupancy:
        capacity_bytes = self._layout.records * self._layout.record_bytes
        return Occupancy(capacity_bytes, self._shelf.used_bytes(), self._shelf.pages_held())

    def keys(self) -> list[bytes]:
        return [entry.key for entry in self._shelf.entries()]

    def rows(self, keys: Sequence[bytes], limit: int) -> list[PageRow]:
        entries = self._shelf.entries()
        if keys:
            wanted = frozenset(keys)
            entries = [entry for entry in entries if entry.key in wanted]
        return entry_rows(entries, limit, self._clock())

    def check(self, key: bytes) -> Finding:
        """Reads the page as a load would. Raises TierFailed, also while the disk is left alone."""
        if self._loads.off(self._clock()):
            raise TierFailed("The disk failed a moment ago and is left alone.")
        looked_at = self._shelf.look(key)
        try:
            if not looked_at:
                return "absent"
            return "good" if self._read_run(looked_at, [self._format.empty()]) else "bad"
        finally:
            self._shelf.unpin(looked_at)
            self._news.tell()

    def close(self) -> None:
        """Calls that are under way end first; nothing comes in any more."""
        with self._mounting:
            self._closed = True
        self._shelf.shut()
        if self._volume is not None:
            with suppress(TierFailed), self._guarded(self._stores):
                self._volume.close()

    # ---- parts

    def _mounted(self) -> Volume:
        """Raises OSError, and TierFailed once it is closed."""
        with self._mounting:
            if self._closed:
                raise TierFailed("The disk tier is closed.")
            if self._volume is None:
                disk, digest, now_s = self._mount(), self._format.digest(), self._clock()
                self._volume = Volume(disk, self._layout, digest, self._places, self.counters, now_s)
                self._shelf.expire(now_s)
                _log.info("disk_tier_open", pages=len(self._shelf.entries()), used_bytes=self._shelf.used_bytes())
            return self._volume

    def _read_run(self, run: Sequence[Pinned], into: Sequence[PageBytes]) -> int:
        volume = self._volume
        assert volume is not None
        try:
            with self._guarded(self._loads):
                good, failure = volume.load(run, into)
        except TierFailed:
            self._shelf.drop_bad(run[0])
            raise
        if failure is not None:
            self._shelf.drop_bad(run[good])
            self.counters.verify_failures[failure] += 1
            _log.warning("disk_page_bad", failure=failure, key=run[good].entry.key.hex())
        return good

    def _count_read(self, good: int, missed: int, seconds: float) -> None:
        self.counters.hits += good
        self.counters.misses += missed
        self.counters.bytes_out += good * self._format.size_bytes
        self.counters.read_s += seconds

    @contextmanager
    def _guarded(self, backoff: Backoff) -> Iterator[None]:
        """Turns OSError into TierFailed and begins a pause; what works ends it."""
        try:
            yield
        except OSError as error:
            backoff.failed(self._clock())
            self.counters.failures += 1
            _log.warning("disk_tier_off", error=str(error), pause_s=backoff.pause_s)
            raise TierFailed(f"The disk tier is off for {backoff.pause_s:.0f} s: {error}.") from error
        backoff.worked()
