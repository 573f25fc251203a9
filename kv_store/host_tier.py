"""Owns the host tier: pages in one arena of fixed slots in this process's memory."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import xxhash

from kv_store.inspection import Finding, Occupancy, PageRow, entry_rows
from kv_store.interpreter import give_way
from kv_store.news import News
from kv_store.page import Page, PageBytes, PageFormat, PageId
from kv_store.tier import Change, TierCounters, TierListener
from kv_store.tier_index import Entry, TierIndex
from pdserve.errors import ConfigInvalid

_PAGES_PER_BATCH = 16  # that come in under one lock: not so many that whoever looks for a page waits for long


@dataclass(slots=True)
class _Admitted:
    """Of pages that are to be stored, the first `seen`. here: how many of them were here already. begun: those that came in, by their
    ordinals; all others were dropped."""

    seen: int = 0
    here: int = 0
    begun: list[tuple[int, Entry]] = field(default_factory=list)


class HostTier:
    """Implements kv_store.tier.PageTier. Its memory is touched at once: a fresh page costs more than the copy into it.

    Pages come in by batches, of which all are copied before any can be found. Pages that may give way to others of one call do so
    only for want of pages that were there before; the listener hears of a call once it is done.
    """

    name = "host"

    def __init__(
        self,
        page_format: PageFormat,
        index: TierIndex,
        listener: TierListener,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        slots = index.capacity_bytes // page_format.size_bytes
        if slots < 1:
            raise ConfigInvalid(
                f"The host tier of {index.capacity_bytes} bytes does not hold one page of {page_format.size_bytes} bytes: "
                "raise store.host_bytes."
            )
        self.counters = TierCounters()
        index.count_in(self.counters.verify_failures)
        self._format = page_format
        self._index = index
        self._clock = clock
        self._changes: list[tuple[Change, Page]] = []
        self._news = News(self._take_changes, listener)
        memory = _touched_memory(slots * page_format.size_bytes)
        self._contents = memory.reshape(slots, page_format.layers, page_format.block_bytes)
        self._checksums = [b""] * slots
        self._free = list(range(slots - 1, -1, -1))
        self._lock = threading.Lock()

    def present(self, ids: Sequence[PageId]) -> int:
        with self._lock:
            return self._index.present(ids, self._clock())

    def read(self, ids: Sequence[PageId], into: Sequence[PageBytes]) -> int:
        started_s = self._clock()
        with self.borrowed(ids) as contents:
            for content, target in zip(contents, into, strict=False):
                np.copyto(target, content)
        good = len(contents)
        self.counters.hits += good
        self.counters.misses += len(ids) - good
        self.counters.bytes_out += good * self._format.size_bytes
        self.counters.read_s += self._clock() - started_s
        return good

    @contextmanager
    def borrowed(self, ids: Sequence[PageId]) -> Iterator[list[PageBytes]]:
        """The verified bytes of the longest readable prefix of `ids`, in place, for a request: a hit of each. They stay while the
        context is open."""
        with self._lock:
            entries = self._index.pin(ids, self._clock())
        try:
            yield [self._contents[entry.place] for entry in entries[: self._good(entries)]]
        finally:
            with self._lock:
                self._release(self._index.unpin(entries))

    @contextmanager
    def borrowed_each(self, ids: Sequence[PageId]) -> Iterator[list[PageBytes | None]]:
        """Like `borrowed`, for all of `ids` that are here, and None for the others. To copy them to other tiers: no hit."""
        with self._lock:
            entries = self._index.pin_each(ids, self._clock())
        try:
            yield [
                self._contents[entry.place] if entry is not None and self._good([entry]) else None for entry in entries
            ]
        finally:
            with self._lock:
                self._release(self._index.unpin(entry for entry in entries if entry is not None))

    def write(self, pages: Sequence[Page], contents: Sequence[PageBytes]) -> int:
        assert len(pages) == len(contents)
        started_s = self._clock()
        here = start = 0
        try:
            while start < len(pages):
                admitted = self._admit(pages[start : start + _PAGES_PER_BATCH])
                self._fill([(entry, contents[start + at]) for at, entry in admitted.begun])
                here += admitted.here + len(admitted.begun)
                start += admitted.seen
                if start < len(pages):
                    give_way()
        finally:
            self.counters.write_s += self._clock() - started_s
            self._news.tell()
        return here

    def remove(self, keys: Sequence[bytes]) -> int:
        with self._lock:
            found = [entry for key in keys if (entry := self._index.get(key)) is not None and entry.state == "ready"]
            for entry in found:
                self._release(self._index.drop(entry.key))
            self._gone(found)
        self._news.tell()
        return len(found)

    def expire(self) -> None:
        """Drops pages that outlived their time."""
        with self._lock:
            gone = self._index.expire(self._clock())
            self._release(gone)
            self._gone(gone)
        self.counters.expired += len(gone)
        self._news.tell()

    def used_bytes(self) -> int:
        return self._index.used_bytes

    def entries(self) -> list[Entry]:
        with self._lock:
            return list(self._index)

    def hold(self, key: bytes, seconds: float) -> bool:
        """Keeps a page for so long, whatever the policy says. False if it is not here."""
        with self._lock:
            return self._index.hold(key, self._clock() + seconds)

    def occupancy(self) -> Occupancy:
        with self._lock:
            return Occupancy(len(self._checksums) * self._format.size_bytes, self._index.used_bytes, len(self._index))

    def keys(self) -> list[bytes]:
        return [entry.key for entry in self._ready()]

    def rows(self, keys: Sequence[bytes], limit: int) -> list[PageRow]:
        entries = self._ready()
        if keys:
            wanted = frozenset(keys)
            entries = [entry for entry in entries if entry.key in wanted]
        return entry_rows(entries, limit, self._clock())

    def check(self, key: bytes) -> Finding:
        with self._lock:
            looked_at = self._index.look(key)
        try:
            if not looked_at:
                return "absent"
            return "good" if self._good(looked_at) else "bad"
        finally:
            with self._lock:
                self._release(self._index.unpin(looked_at))

    def close(self) -> None:
        with self._lock:
            self._index.capacity_bytes = 0  # nothing comes in any more

    # ---- parts

    def _ready(self) -> list[Entry]:
        return [entry for entry in self.entries() if entry.state == "ready"]

    def _admit(self, pages: Sequence[Page]) -> _Admitted:
        """Slots for as many of `pages` as can be decided at once: where one finds no room beside those before it, these may be what
        gives way, which they can when they are ready."""
        admitted, now_s = _Admitted(), self._clock()
        with self._lock:
            for at, page in enumerate(pages):
                here = self._index.get(page.id.key)
                unready = here is not None and here.state == "writing"
                if here is not None and not unready and self._index.present([page.id], now_s):
                    admitted.here += 1
                    continue
                entry = self._begin(page, now_s)
                if entry is not None:
                    admitted.begun.append((at, entry))
                elif admitted.begun and (here is None or unready):
                    admitted.seen = at
                    return admitted
                else:
                    self.counters.dropped += 1
        admitted.seen = len(pages)
        return admitted

    def _begin(self, page: Page, now_s: float) -> Entry | None:
        """None where it may not come in."""
        size_bytes = self._format.size_bytes
        granted, evicted = self._index.make_room(page, size_bytes, now_s)
        if evicted:
            self._release(evicted)
            self._gone(evicted)
            self.counters.evicted += len(evicted)
            self.counters.evicted_age_s += sum(now_s - gone.stored_s for gone in evicted)
        if not granted or not self._free:  # what is dropped while it is read still has its slot
            return None
        return self._index.begin(page, size_bytes, self._free.pop(), now_s)

    def _fill(self, begun: Sequence[tuple[Entry, PageBytes]]) -> None:
        """All of them can be found when this returns, none of them after an error."""
        try:
            for entry, content in begun:
                target = self._contents[entry.place]
                np.copyto(target, content)
                self._checksums[entry.place] = _checksum(entry.page.id, target)
        except BaseException:
            with self._lock:
                for entry, _ in begun:
                    self._index.abort(entry)
                    self._free.append(entry.place)
            raise
        with self._lock:
            for entry, _ in begun:
                self._index.commit(entry)
                self._changes.append(("stored", entry.page))
            self.counters.stored += len(begun)
            self.counters.bytes_in += len(begun) * self._format.size_bytes

    def _good(self, entries: Sequence[Entry]) -> int:
        """How many of `entries` have the bytes that were stored; the first bad one is dropped."""
        for ordinal, entry in enumerate(entries):
            if _checksum(entry.page.id, self._contents[entry.place]) != self._checksums[entry.place]:
                self.counters.verify_failures["checksum"] += 1
                with self._lock:
                    # Dropped meanwhile, it may have been stored anew: that copy is not this one.
                    if self._index.get(entry.key) is entry:
                        self._release(self._index.drop(entry.key))
                        self._gone([entry])
                self._news.tell()
                return ordinal
        return len(entries)

    def _release(self, entries: Sequence[Entry]) -> None:
        self._free += [entry.place for entry in entries]

    def _gone(self, entries: Sequence[Entry]) -> None:
        self._changes += [("evicted", entry.page) for entry in entries]

    def _take_changes(self) -> list[tuple[Change, Page]]:
        with self._lock:
            changes, self._changes = self._changes, []
        return changes


def _checksum(page_id: PageId, content: PageBytes) -> bytes:
    """Of a page's bytes together with the tokens that they were computed from."""
    hasher = xxhash.xxh3_128(content.data)
    hasher.update(page_id.tokens)
    return hasher.digest()


def _touched_memory(size_bytes: int) -> PageBytes:
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    touched: PageBytes = np.frombuffer(memory, dtype=np.uint8)
    touched.fill(0)
    return touched
