"""Owns loads in progress: blocks that the engine opened for pages, filled from our own tiers and from a peer side by side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.page_protocol import PagesOpened
from engine.protocol import KvSource
from kv_store.tiered_store import LoadReport
from service_kit.logs import get_logger
from worker_runtime.page_openings import PageOpenings
from worker_runtime.page_pulls import PEER_TIER, OpenPages, PagePulls
from worker_runtime.stretches import Stretch
from worker_runtime.tier_reads import TierReads

WAIT_FOR_ROOM_S, LONGEST_WAIT_FOR_ROOM_S = 0.01, 0.25
STUCK_GRACE_S = 0.25  # beyond the deadline of a load, for the read in progress

log = get_logger(__name__)


@dataclass(slots=True)
class LoadFigures:
    """Since the start. Tokens that were looked for and loaded; loads that ended late or found no room."""

    queried_tokens: int = 0
    loaded_tokens: dict[str, int] = field(default_factory=dict)  # by tier
    late: int = 0
    no_room: int = 0
    not_worth_it: int = 0
    offers_skipped: int = 0
    load_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be loaded: pages before `own_end` from our tiers, those after it from `source`. load_s: predicted."""

    stretch: Stretch
    own_end: int
    source: KvSource | None
    load_s: float


@dataclass(frozen=True, slots=True)
class Fill:
    """A load in progress. Nobody writes to its blocks any more when `reading` is done; its PagesLoaded goes out then by itself."""

    load_id: int
    reading: asyncio.Task[LoadReport]

    @property
    def late(self) -> bool:
        if not self.reading.done():
            return True
        return self.reading.exception() is None and self.reading.result().late


class PageFills:
    """pulls: None = from no peer."""

    def __init__(
        self, openings: PageOpenings, reads: TierReads, pulls: PagePulls | None, figures: LoadFigures, page_tokens: int
    ) -> None:
        self._openings = openings
        self._reads = reads
        self._pulls = pulls
        self._figures = figures
        self._page_tokens = page_tokens
        self._reading: set[asyncio.Task[LoadReport]] = set()

    async def begin(self, plan: Plan, deadline_s: float) -> Fill | None:
        """None: there is no room, or all of it came in meanwhile."""
        opened = await self._open(plan, deadline_s)
        if opened is None:
            self._figures.no_room += 1
            return None
        reading = asyncio.create_task(self._fill(plan, opened, deadline_s), name="kv-fill")
        self._reading.add(reading)
        reading.add_done_callback(lambda done: self._filled(opened.load_id, done))
        return Fill(opened.load_id, reading)

    async def wait(self, fills: Sequence[Fill], deadline_s: float) -> None:
        """Until all have ended, or their deadline is over."""
        if not fills:
            return
        started_s = time.monotonic()
        timeout_s = max(0.0, deadline_s - started_s) + STUCK_GRACE_S
        await asyncio.wait([fill.reading for fill in fills], timeout=timeout_s)
        self._figures.load_s += time.monotonic() - started_s
        self._figures.late += sum(fill.late for fill in fills)

    # ---- parts

    async def _open(self, plan: Plan, deadline_s: float) -> PagesOpened | None:
        """Blocks for what is to be loaded. Waits a little for room, which the work itself needs as much: those of the request before
        may be free in a moment."""
        room_by_s = min(deadline_s, time.monotonic() + LONGEST_WAIT_FOR_ROOM_S)
        while True:
            opened = await self._openings.open(plan.stretch.to_load, deadline_s)
            if opened is None or opened.blocks:
                return opened
            self._openings.end(opened.load_id, 0)
            if opened.first_page or time.monotonic() >= room_by_s:  # first_page: all of it came in meanwhile
                return None
            await asyncio.sleep(WAIT_FOR_ROOM_S)

    async def _fill(self, plan: Plan, opened: PagesOpened, deadline_s: float) -> LoadReport:
        """From our own tiers and from the peer side by side. Nobody writes to the opened blocks any more when it is done."""
        first = opened.first_page
        own = max(0, min(plan.own_end - first, len(opened.blocks)))
        pulling = asyncio.create_task(self._pull(plan, opened, own, deadline_s), name="kv-pull")
        try:
            ids, blocks = plan.stretch.ids[first : first + own], opened.blocks[:own]
            report = await self._reads.load(ids, blocks, deadline_s) if own else LoadReport()
        finally:
            pulled = await pulling
        if pulled and report.good == own:  # else there is a gap before what was pulled
            report.good += pulled
            report.by_tier[PEER_TIER] += pulled
        return report

    async def _pull(self, plan: Plan, opened: PagesOpened, own: int, deadline_s: float) -> int:
        if self._pulls is None or plan.source is None or own == len(opened.blocks):
            return 0
        into = OpenPages(opened.first_page + own, opened.blocks[own:], opened.generations[own:])
        return await self._pulls.pull(plan.source, plan.stretch, into, deadline_s)

    def _filled(self, load_id: int, done: asyncio.Task[LoadReport]) -> None:
        """However late."""
        self._reading.discard(done)
        error = None if done.cancelled() else done.exception()
        report = LoadReport() if done.cancelled() or error is not None else done.result()
        if error is not None:
            log.exception("pages_not_loaded", error)
        for tier, pages in report.by_tier.items():
            tokens = pages * self._page_tokens
            self._figures.loaded_tokens[tier] = self._figures.loaded_tokens.get(tier, 0) + tokens
        self._openings.end(load_id, report.good)
