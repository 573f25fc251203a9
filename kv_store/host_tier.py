"""Owns the host tier: pages in one arena of fixed slots in this process's memory."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import xxhash

from kv_store.inspection import Finding, Occupancy, PageRow, entry_rows
from kv_store.news import News
from kv_store.page import Page, PageBytes, PageFormat, PageId
from kv_store.tier import Change, TierCounters, TierListener
from kv_store.tier_index import Entry, TierIndex
from pdserve.errors import ConfigInvalid


class HostTier:
    """Implements kv_store.tier.PageTier. Its memory is touched at once: a fresh page costs more than the copy into it."""

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
        self._slots = _touched_memory(slots * page_format.size_bytes).reshape(slots, page_format.size_bytes)
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
        """The verified bytes of the longest readable prefix of `ids`, in place. They stay while the context is open."""
        with self._lock:
            entries = self._index.pin(ids, self._clock())
        try:
            yield [self._content(entry.place) for entry in entries[: self._good(entries)]]
        finally:
            with self._lock:
                self._release(self._index.unpin(entries))

    def write(self, pages: Sequence[Page], contents: Sequence[PageBytes]) -> int:
        started_s = self._clock()
        here = 0
        for page, content in zip(pages, contents, strict=True):
            here += self._write_one(page, content)
        self.counters.write_s += self._clock() - started_s
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

    def _write_one(self, page: Page, content: PageBytes) -> bool:
        size_bytes, now_s = self._format.size_bytes, self._clock()
        with self._lock:
            if self._index.present([page.id], now_s):
                return True
            granted, evicted = self._index.make_room(page, size_bytes, now_s)
            self._release(evicted)
            self._gone(evicted)
            granted = granted and bool(self._free)  # what is dropped while it is read still has its slot
            entry = self._index.begin(page, size_bytes, self._free.pop(), now_s) if granted else None
        self.counters.evicted += len(evicted)
        self.counters.evicted_age_s += sum(now_s - gone.stored_s for gone in evicted)
        if entry is None:
            self.counters.dropped += 1
            self._news.tell()
            return False
        target = self._content(entry.place)
        np.copyto(target, content)
        self._checksums[entry.place] = _checksum(page.id, target)
        with self._lock:
            self._index.commit(entry)
            self._changes.append(("stored", page))
        self.counters.stored += 1
        self.counters.bytes_in += size_bytes
        self._news.tell()
        return True

    def _good(self, entries: Sequence[Entry]) -> int:
        """How many of `entries` have the bytes that were stored; the first bad one is dropped."""
        for ordinal, entry in enumerate(entries):
            if _checksum(entry.page.id, self._content(entry.place)) != self._checksums[entry.place]:
                self.counters.verify_failures["checksum"] += 1
                with self._lock:
                    # Dropped meanwhile, it may have been stored anew: that copy is not this one.
                    if self._index.get(entry.key) is entry:
                        self._release(self._index.drop(entry.key))
                        self._gone([entry])
                self._news.tell()
                return ordinal
        return len(entries)

    def _content(self, slot: int) -> PageBytes:
        content: PageBytes = self._slots[slot]
        return content.reshape(self._format.layers, self._format.block_bytes)

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
