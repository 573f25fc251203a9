"""Owns the tiers below the device together: where a page is, loads from the nearest tier that has it, saves that never block.

Loads and saves run in threads of their own, so that a load never queues behind a save. A saved page is copied to the host tier at
once; from there it goes down to all lower tiers as they keep up, and is dropped where they do not. Each tier is told what a hit in
it saves by the speeds of that moment; they are not corrected later.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kv_store.benefit import benefits_s
from kv_store.host_tier import HostTier
from kv_store.interpreter import give_way
from kv_store.page import Page, PageBytes, PageId
from kv_store.split import Run, Speed
from kv_store.tier import PageTier, TierFailed
from service_kit.logs import get_logger

_PAGES_PER_READ = 16  # between two looks at the deadline
_PAGES_PER_WRITE = 64
_PAGES_QUEUED = 1024  # on their way down; more are dropped
_JOIN_S = 5.0
# Guesses until the first measurement, in bytes per second: low, so that a first load is tried.
_GUESSED_BYTES_PER_S = {"host": 4e9, "disk": 1e9, "redis": 3e8}
_GUESSED_REMOTE_BYTES_PER_S = 3e8

log = get_logger(__name__)


@dataclass(slots=True)
class LoadReport:
    """good: pages that were loaded, from the first on. by_tier: their number per tier. late: the deadline ended it."""

    good: int = 0
    by_tier: Counter[str] = field(default_factory=Counter)
    late: bool = False


class TieredStore:
    """`load` and `save` block and belong in threads; the rest may be called anywhere."""

    def __init__(
        self,
        host: HostTier,
        lower: Sequence[PageTier],
        page_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tiers: tuple[PageTier, ...] = (host, *lower)
        self.speeds = {
            tier.name: Speed(page_bytes / _GUESSED_BYTES_PER_S.get(tier.name, _GUESSED_REMOTE_BYTES_PER_S))
            for tier in self.tiers
        }
        self.dropped_on_the_way_down = 0
        self._host = host
        self._lower = tuple(lower)
        self._clock = clock
        self._down: queue.Queue[list[Page] | None] = queue.Queue()
        self._queued = 0
        self._queue_lock = threading.Lock()
        self._writer = threading.Thread(target=self._write_down, name="kv-store-writer", daemon=True)
        if lower:
            self._writer.start()

    def locate(self, ids: Sequence[PageId]) -> list[Run]:
        """Where the longest stored prefix of `ids` lies: for each stretch the nearest tier that has it."""
        runs: list[Run] = []
        start = 0
        while start < len(ids):
            run = self._longest(ids[start:])
            if run is None:
                break
            runs.append(run)
            start += run.pages
        return runs

    def load(self, ids: Sequence[PageId], into: Sequence[PageBytes], deadline_s: float) -> LoadReport:
        """Copies pages, verified, until one is nowhere, fails everywhere, or the deadline (of `clock`) has passed."""
        report = LoadReport()
        while report.good < len(ids):
            if self._clock() >= deadline_s:
                report.late = True
                break
            rest = slice(report.good, report.good + _PAGES_PER_READ)
            if not self._load_some(ids[rest], into[rest], report):
                break
        return report

    def save(self, pages: Sequence[Page], contents: Sequence[PageBytes]) -> None:
        """Copies pages to the host tier; the lower tiers get them later. `contents` may be reused when it returns.
        `saving_s` of the pages: seconds to compute them again.

        What the host tier has no room for (a chain longer than itself) goes straight to the lower tiers.
        """
        self._host.write(self._valued(pages, 0), contents)
        if not self._lower:
            return
        kept = self._held(pages, contents)
        with self._queue_lock:
            fits = self._queued + len(kept) <= _PAGES_QUEUED
            self._queued += len(kept) if fits else 0
            self.dropped_on_the_way_down += 0 if fits else len(kept)
        if fits and kept:
            self._down.put(kept)

    def settle(self, deadline_s: float) -> bool:
        """Waits until everything saved so far has gone down, or the deadline has passed."""
        while self._queued and self._clock() < deadline_s:
            time.sleep(0.002)
        return not self._queued

    def close(self) -> None:
        if self._lower:
            self._down.put(None)
            self._writer.join(_JOIN_S)
        for tier in self.tiers:
            tier.close()

    # ---- parts

    def _held(self, pages: Sequence[Page], contents: Sequence[PageBytes]) -> list[Page]:
        """Those that are in the host tier now. All others go straight to the lower tiers."""
        kept: list[Page] = []
        left: list[tuple[Page, PageBytes]] = []
        while (start := len(kept) + len(left)) < len(pages):
            end = start + self._host.present([page.id for page in pages[start:]])
            kept += pages[start:end]
            left += zip(pages[end : end + 1], contents[end : end + 1], strict=True)
        for at in range(0, len(left), _PAGES_PER_WRITE):
            some = left[at : at + _PAGES_PER_WRITE]
            self._write_lower([page for page, _ in some], [content for _, content in some])
        return kept

    def _longest(self, ids: Sequence[PageId]) -> Run | None:
        """The nearest tier that has the first page, and how far it reaches."""
        for tier in self.tiers:
            pages = self._present(tier, ids)
            if pages:
                return Run(tier.name, pages)
        return None

    def _present(self, tier: PageTier, ids: Sequence[PageId]) -> int:
        try:
            return tier.present(ids)
        except TierFailed:
            return 0

    def _load_some(self, ids: Sequence[PageId], into: Sequence[PageBytes], report: LoadReport) -> bool:
        """One read, from the nearest tier that has the first page good. False: none has."""
        for tier in self.tiers:
            started_s = self._clock()
            try:
                pages = tier.present(ids)
                good = tier.read(ids[:pages], into[:pages]) if pages else 0
            except TierFailed as error:
                log.warning("tier_read_failed", tier=tier.name, message=error.message)
                continue
            if good:
                self.speeds[tier.name].measured(good, self._clock() - started_s)
                report.good += good
                report.by_tier[tier.name] += good
                return True
        return False

    def _write_down(self) -> None:
        """The writer thread: from the host tier to all lower ones, until `close`."""
        while (pages := self._down.get()) is not None:
            for start in range(0, len(pages), _PAGES_PER_WRITE):
                self._write_batch(pages[start : start + _PAGES_PER_WRITE])
            with self._queue_lock:
                self._queued -= len(pages)

    def _write_batch(self, pages: Sequence[Page]) -> None:
        with self._host.borrowed_each([page.id for page in pages]) as borrowed:
            # What left the host tier before its turn came is not worth going down any more.
            kept = [(page, content) for page, content in zip(pages, borrowed, strict=True) if content is not None]
            self.dropped_on_the_way_down += len(pages) - len(kept)
            give_way()
            self._write_lower([page for page, _ in kept], [content for _, content in kept])

    def _write_lower(self, pages: Sequence[Page], contents: Sequence[PageBytes]) -> None:
        for at, tier in enumerate(self._lower, start=1):
            try:
                tier.write(self._valued(pages, at), contents)
            except TierFailed as error:
                log.warning("tier_write_failed", tier=tier.name, message=error.message)

    def _valued(self, pages: Sequence[Page], tier_at: int) -> list[Page]:
        """`pages` with what a hit in that tier saves. What a peer may have of them is not known here."""
        here, *below = [self.speeds[tier.name] for tier in self.tiers[tier_at:]]
        savings_s = benefits_s([page.saving_s for page in pages], here, below)
        return [
            Page(page.id, page.parent, page.unit_keys, page.tenant, saving_s)
            for page, saving_s in zip(pages, savings_s, strict=True)
        ]
