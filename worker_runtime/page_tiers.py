"""Owns the worker's tiers: saves what the engine offers, and loads what a prompt finds there before its work is submitted.

                      nothing to load
    submit(work) ------------------------------------------------> Submit
        |                                                            ^
        +-- LoadPages --> PagesOpened --> load in a thread --> PagesLoaded
                               |     and pull from a peer            ^
                               |              |                      |
                               +--------------+-- deadline: Submit --+  (its blocks stay open until nobody writes to them)

A load that fails, comes late or comes short changes nothing but what is computed: pages that were verified enter the prefix
index, the rest of the prompt is prefilled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from engine.page_protocol import KvOffered, OfferPages, PagesOpened, PagesSaved
from engine.protocol import Cancel, Dispatch, EngineReady, KvSource, Submit, Work
from kv_store.page import Page, PageFormat, PageId
from kv_store.split import Run, Speed, best_split
from kv_store.tier import Change, TierListener
from kv_store.tiered_store import LoadReport, TieredStore
from kv_transfer.keys import HASH_BYTES
from pdserve.errors import PdserveError, WorkerLost
from service_kit.config import StoreConfig
from service_kit.logs import get_logger
from worker_runtime.engine_link import EngineLink
from worker_runtime.page_openings import PageOpenings
from worker_runtime.page_pulls import PEER_TIER, OpenPages, PagePulls
from worker_runtime.session import SessionHub
from worker_runtime.stretches import Stretch, StretchCutter
from worker_runtime.task_owner import TaskOwner
from worker_runtime.tier_reads import TierReads, arena_pages

LOAD_THREADS = 2
WAIT_FOR_ROOM_S, LONGEST_WAIT_FOR_ROOM_S = 0.01, 0.25
STUCK_GRACE_S = 0.25  # beyond the deadline of a load, for the read in progress

log = get_logger(__name__)

_UNMEASURED_COMPUTE_S = 1.0  # per page: until something was computed here, every load is worth it


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


@dataclass(slots=True)
class _Waiting:
    """A dispatch whose pages are being loaded; cancels of single choices that came meanwhile."""

    cancelled: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be loaded: pages before `own_end` from our tiers, those after it from `source`."""

    stretch: Stretch
    own_end: int
    source: KvSource | None


def page_format(ready: EngineReady) -> PageFormat:
    layout = ready.layout
    return PageFormat(ready.identity, layout.page_tokens, layout.layers, layout.block_bytes)


class TierNews:
    """What the tiers store and evict, told to the sessions in the event loop's thread."""

    def __init__(self, hub: SessionHub, loop: asyncio.AbstractEventLoop) -> None:
        self._hub = hub
        self._loop = loop

    def listener(self, tier: str) -> TierListener:
        def changed(change: Change, pages: Sequence[Page]) -> None:
            hashes = b"".join(page.unit_keys for page in pages)
            if hashes and not self._loop.is_closed():
                tell = self._hub.kv_stored if change == "stored" else self._hub.kv_evicted
                self._loop.call_soon_threadsafe(tell, hashes, tier)

        return changed


OpenStore = Callable[[PageFormat, TierNews], TieredStore]


class PageTiers:
    """holds(unit key): whether the engine's prefix index has it, as far as this process knows. pulls: None = from no peer."""

    def __init__(
        self,
        store: TieredStore,
        engine: EngineLink,
        config: StoreConfig,
        tasks: TaskOwner,
        holds: Callable[[bytes], bool],
        pulls: PagePulls | None = None,
    ) -> None:
        layout = engine.ready.layout
        self.openings = PageOpenings(engine)
        self.cutter = StretchCutter(engine.ready)
        self.figures = LoadFigures()
        self._compute_page_s = _UNMEASURED_COMPUTE_S
        self._store = store
        self._engine = engine
        self._config = config
        self._tasks = tasks
        self._holds = holds
        self._page_tokens = layout.page_tokens
        self._pulls = pulls
        self._arena = arena_pages(engine)
        self._reads = TierReads(store, self._arena, LOAD_THREADS, "kv-load")
        self._filling: set[asyncio.Task[LoadReport]] = set()
        self._savers = ThreadPoolExecutor(1, "kv-save")
        self._waiting: dict[Dispatch, _Waiting] = {}
        engine.send(OfferPages(max(1, int(config.offered_share * layout.blocks))))

    # ---- saving

    def offered(self, event: KvOffered) -> None:
        self.figures.offers_skipped += event.skipped
        if not event.pages:
            return
        saving = self._compute_page_s
        pages = [
            Page(
                PageId(each.unit_keys[-HASH_BYTES:], each.fingerprint), each.parent, each.unit_keys, each.tenant, saving
            )
            for each in event.pages
        ]
        blocks = tuple(each.block for each in event.pages)
        future = asyncio.get_running_loop().run_in_executor(self._savers, self._save, pages, blocks)
        future.add_done_callback(lambda done: self._saved(blocks, done))

    def _save(self, pages: Sequence[Page], blocks: Sequence[int]) -> None:
        self._store.save(pages, [self._arena[:, block] for block in blocks])

    def _saved(self, blocks: tuple[int, ...], done: asyncio.Future[None]) -> None:
        error = None if done.cancelled() else done.exception()
        if error is not None:
            log.exception("pages_not_saved", error)
        self._send(PagesSaved(blocks))

    # ---- loading

    def submit(self, command: Submit) -> None:
        """Sends `command` to the engine, once what the tiers have of its prompt is loaded, or at the deadline."""
        stretches = self._missing(command.work)
        if not stretches:
            self._engine.send(command)
            return
        self._waiting[command.work.dispatch] = _Waiting()
        self._tasks.spawn(self._load_and_submit(command, stretches), lambda error: self._load_failed(command, error))

    def cancel_choices(self, dispatch: Dispatch, choices: tuple[int, ...]) -> None:
        """Cancels some choices of a dispatch, after its Submit."""
        waiting = self._waiting.get(dispatch)
        if waiting is not None:
            waiting.cancelled.append(choices)
        else:
            self._engine.send(Cancel(dispatch, choices))

    def opened(self, event: PagesOpened) -> None:
        self.openings.opened(event)

    def computes(self, token_s: float) -> None:
        """What a load competes with; 0 = not measured yet."""
        if token_s > 0:
            self._compute_page_s = token_s * self._page_tokens

    def close(self) -> None:
        self._reads.close()
        self._savers.shutdown(wait=False, cancel_futures=True)
        self._store.close()

    # ---- parts

    def _missing(self, work: Work) -> list[Stretch]:
        """What may be reused of the prompt and is not on the device, as far as this process knows."""
        if work.sampling.prompt_logprobs is not None:
            return []
        cutter = self.cutter
        stretches = [cutter.chunk(work, chunk) for chunk in work.chunks] if work.blend else [cutter.prefix(work)]
        return [stretch for stretch in stretches if not all(self._holds(page.key) for page in stretch.ids)]

    async def _load_and_submit(self, command: Submit, stretches: Sequence[Stretch]) -> None:
        deadline_s = time.monotonic() + self._config.load_deadline_s
        for stretch in stretches:
            await self._load_stretch(stretch, command.work.source, deadline_s)
        self._enter(command)

    async def _load_stretch(self, stretch: Stretch, source: KvSource | None, deadline_s: float) -> None:
        ids = stretch.ids
        held = next((at for at, page in enumerate(ids) if not self._holds(page.key)), len(ids))
        self.figures.queried_tokens += (len(ids) - held) * self._page_tokens
        locating = self._reads.locate(ids[held:])
        await asyncio.wait([locating], timeout=max(0.0, deadline_s - time.monotonic()))
        if not locating.done():
            self.figures.late += 1  # all threads read from a medium that is stuck
            return
        runs = locating.result()
        own_end = held + sum(run.pages for run in runs)
        peer = self._peer_run(stretch, source, own_end)
        runs += [peer] if peer is not None else []
        if not runs:
            return
        split = best_split(runs, len(ids) - held, self._speeds(), self._compute_page_s)
        if split.load_pages and (stretch.in_parts or held + split.load_pages == len(ids)):
            # A long load may take its time: it was chosen because computing takes longer.
            deadline_s = max(deadline_s, time.monotonic() + 2 * split.load_s)
            await self._load(_Plan(stretch.first(held + split.load_pages), own_end, source), deadline_s)
        else:
            self.figures.not_worth_it += 1

    def _peer_run(self, stretch: Stretch, source: KvSource | None, own_end: int) -> Run | None:
        if self._pulls is None or not stretch.in_parts:
            return None
        return self._pulls.run(source, own_end, len(stretch.ids))

    def _speeds(self) -> dict[str, Speed]:
        peer = {PEER_TIER: self._pulls.speed} if self._pulls is not None else {}
        return {**self._store.speeds, **peer}

    async def _load(self, plan: _Plan, deadline_s: float) -> None:
        opened = await self._open(plan, deadline_s)
        if opened is None:
            self.figures.no_room += 1
            return
        started_s = time.monotonic()
        filling = asyncio.create_task(self._fill(plan, opened, deadline_s), name="kv-fill")
        self._filling.add(filling)
        filling.add_done_callback(lambda done: self._filled(opened.load_id, done))
        await asyncio.wait([filling], timeout=max(0.0, deadline_s - started_s) + STUCK_GRACE_S)
        self.figures.load_s += time.monotonic() - started_s
        self.figures.late += not filling.done() or filling.result().late

    async def _open(self, plan: _Plan, deadline_s: float) -> PagesOpened | None:
        """Blocks for what is to be loaded. Waits a little for room, which the work itself needs as much: those of the request before
        may be free in a moment."""
        room_by_s = min(deadline_s, time.monotonic() + LONGEST_WAIT_FOR_ROOM_S)
        while True:
            opened = await self.openings.open(plan.stretch.to_load, deadline_s)
            if opened is None or opened.blocks:
                return opened
            self.openings.end(opened.load_id, 0)
            if opened.first_page or time.monotonic() >= room_by_s:  # first_page: all of it came in meanwhile
                return None
            await asyncio.sleep(WAIT_FOR_ROOM_S)

    async def _fill(self, plan: _Plan, opened: PagesOpened, deadline_s: float) -> LoadReport:
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

    async def _pull(self, plan: _Plan, opened: PagesOpened, own: int, deadline_s: float) -> int:
        if self._pulls is None or plan.source is None or own == len(opened.blocks):
            return 0
        into = OpenPages(opened.first_page + own, opened.blocks[own:], opened.generations[own:])
        return await self._pulls.pull(plan.source, plan.stretch, into, deadline_s)

    def _filled(self, load_id: int, done: asyncio.Task[LoadReport]) -> None:
        """However late."""
        self._filling.discard(done)
        error = None if done.cancelled() else done.exception()
        report = LoadReport() if done.cancelled() or error is not None else done.result()
        if error is not None:
            log.exception("pages_not_loaded", error)
        for tier, pages in report.by_tier.items():
            tokens = pages * self._page_tokens
            self.figures.loaded_tokens[tier] = self.figures.loaded_tokens.get(tier, 0) + tokens
        self.openings.end(load_id, report.good)

    def _load_failed(self, command: Submit, error: PdserveError) -> None:
        log.warning("load_failed", request_id=command.work.request_id, reason=error.reason, message=error.message)
        self._enter(command)

    def _enter(self, command: Submit) -> None:
        self._send(command)
        for choices in self._waiting.pop(command.work.dispatch).cancelled:
            self._send(Cancel(command.work.dispatch, choices))

    def _send(self, command: Submit | Cancel | PagesSaved) -> None:
        """Without effect once the engine is gone: the node ends then."""
        try:
            self._engine.send(command)
        except WorkerLost as lost:
            log.debug("engine_gone", message=lost.message)
