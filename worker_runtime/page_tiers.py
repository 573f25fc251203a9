"""Owns the worker's tiers: saves what the engine offers, and loads what a prompt finds there.

                      nothing to load
    submit(work) ------------------------------------------------> Submit
        |                                                            ^
        +-- LoadPages --> PagesOpened --> load in a thread --> PagesLoaded
                     |         |     and pull from a peer            ^
                     |         |              |                      |
                     |         +--------------+-- deadline: Submit --+  (its blocks stay open until nobody writes to them)
                     |
                     +-- of chunks: Submit, and load beside it -- deadline: PagesLate

A load that fails, comes late or comes short changes nothing but what is computed: pages that were verified enter the prefix
index, the rest of the prompt is prefilled. The pages of chunks are loaded beside the blend, which waits for them where it first
reads them: chunks that have not come by the deadline are computed alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec

from engine.page_protocol import KvOffered, OfferedPage, OfferPages, PagesLate, PagesOpened, PagesSaved
from engine.protocol import Cancel, Dispatch, EngineReady, KvSource, Submit, Work
from kv_store.benefit import ComputeCost
from kv_store.page import Page, PageFormat, PageId
from kv_store.split import Run, Speed, best_split
from kv_store.tier import Change, TierListener
from kv_store.tiered_store import TieredStore
from kv_transfer.keys import HASH_BYTES
from pdserve.errors import PdserveError, WorkerLost
from service_kit.config import StoreConfig
from service_kit.logs import get_logger
from worker_runtime.engine_link import EngineLink
from worker_runtime.page_fills import LoadFigures, PageFills, Plan
from worker_runtime.page_openings import PageOpenings
from worker_runtime.page_pulls import PEER_TIER, PagePulls
from worker_runtime.session import SessionHub
from worker_runtime.stretches import Stretch, StretchCutter
from worker_runtime.task_owner import TaskOwner
from worker_runtime.tier_reads import TierReads, arena_pages

LOAD_THREADS = 2

log = get_logger(__name__)

_UNMEASURED_COMPUTE_S = (
    1.0  # per page: until something was computed here, every load is worth it. No saving of a stored page
)


@dataclass(slots=True)
class _Waiting:
    """A dispatch whose pages are being loaded; cancels of single choices that came meanwhile."""

    cancelled: list[tuple[int, ...]] = field(default_factory=list)


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
        self._cost = ComputeCost(engine.ready.token_growth * layout.page_tokens)
        self._store = store
        self._engine = engine
        self._config = config
        self._tasks = tasks
        self._holds = holds
        self._page_tokens = layout.page_tokens
        self._pulls = pulls
        self._arena = arena_pages(engine)
        self._reads = TierReads(store, self._arena, LOAD_THREADS, "kv-load")
        self._fills = PageFills(self.openings, self._reads, pulls, self.figures, layout.page_tokens)
        self._savers = ThreadPoolExecutor(1, "kv-save")
        self._waiting: dict[Dispatch, _Waiting] = {}
        engine.send(OfferPages(max(1, int(config.offered_share * layout.blocks))))

    # ---- saving

    def offered(self, event: KvOffered) -> None:
        self.figures.offers_skipped += event.skipped
        if not event.pages:
            return
        self._cost.offered([each.ordinal for each in event.pages])
        pages = [self._page(each) for each in event.pages]
        blocks = tuple(each.block for each in event.pages)
        future = asyncio.get_running_loop().run_in_executor(self._savers, self._save, pages, blocks)
        future.add_done_callback(lambda done: self._saved(blocks, done))

    def _page(self, offered: OfferedPage) -> Page:
        page_id = PageId(offered.unit_keys[-HASH_BYTES:], offered.fingerprint, offered.tokens)
        return Page(page_id, offered.parent, offered.unit_keys, offered.tenant, self._cost.of(offered.ordinal))

    def _save(self, pages: Sequence[Page], blocks: Sequence[int]) -> None:
        self._store.save(pages, [self._arena[:, block] for block in blocks])

    def _saved(self, blocks: tuple[int, ...], done: asyncio.Future[None]) -> None:
        error = None if done.cancelled() else done.exception()
        if error is not None:
            log.exception("pages_not_saved", error)
        self._send(PagesSaved(blocks))

    # ---- loading

    def submit(self, command: Submit) -> None:
        """Sends `command` to the engine, once what the tiers have of its prompt is loaded, or at the deadline. Blended work goes there
        as soon as its loads have begun."""
        stretches = self._missing(command.work)
        if not stretches:
            self._engine.send(command)
            return
        self._waiting[command.work.dispatch] = _Waiting()
        loading = (
            self._load_beside(command, stretches) if command.work.blend else self._load_first(command, stretches[0])
        )
        self._tasks.spawn(loading, lambda error: self._load_failed(command, error))

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
        self._cost.measured(token_s * self._page_tokens)
        if self._pulls is not None:
            self._pulls.computes(self._cost.page_s)

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
        each_once = {chunk.keys: chunk for chunk in work.chunks}.values()
        stretches = [cutter.chunk(work, chunk) for chunk in each_once] if work.blend else [cutter.prefix(work)]
        return [stretch for stretch in stretches if not all(self._holds(page.key) for page in stretch.ids)]

    async def _load_first(self, command: Submit, prefix: Stretch) -> None:
        deadline_s = time.monotonic() + self._config.load_deadline_s
        plan = await self._plan(prefix, command.work.source, deadline_s)
        if plan is not None:
            # A long load may take its time: it was chosen because computing takes longer.
            deadline_s = max(deadline_s, time.monotonic() + 2 * plan.load_s)
            fill = await self._fills.begin(plan, deadline_s)
            await self._fills.wait([fill] if fill is not None else [], deadline_s)
        self._enter(command)

    async def _load_beside(self, command: Submit, chunks: Sequence[Stretch]) -> None:
        """All chunks are located and get their blocks at once: the engine answers all of it between two of its steps."""
        deadline_s = time.monotonic() + self._config.load_deadline_s
        found = await asyncio.gather(*(self._plan(chunk, None, deadline_s) for chunk in chunks))
        plans = [plan for plan in found if plan is not None]
        deadline_s = max(deadline_s, time.monotonic() + 2 * sum(plan.load_s for plan in plans))
        begun = await asyncio.gather(*(self._fills.begin(plan, deadline_s) for plan in plans))
        fills = {plan.stretch.keys: fill for plan, fill in zip(plans, begun, strict=True) if fill is not None}
        ids = {keys: fill.load_id for keys, fill in fills.items()}
        loads = tuple(ids.get(chunk.keys, 0) for chunk in command.work.chunks) if ids else ()
        try:
            self._enter(msgspec.structs.replace(command, loads=loads))
            await self._fills.wait(list(fills.values()), deadline_s)
        finally:
            for fill in fills.values():
                if not fill.reading.done():
                    self._send(PagesLate(fill.load_id))

    async def _plan(self, stretch: Stretch, source: KvSource | None, deadline_s: float) -> Plan | None:
        """What is worth loading of a stretch, if anything."""
        ids = stretch.ids
        held = next((at for at, page in enumerate(ids) if not self._holds(page.key)), len(ids))
        self.figures.queried_tokens += (len(ids) - held) * self._page_tokens
        locating = self._reads.locate(ids[held:])
        await asyncio.wait([locating], timeout=max(0.0, deadline_s - time.monotonic()))
        if not locating.done():
            self.figures.late += 1  # all threads read from a medium that is stuck
            return None
        runs = locating.result()
        own_end = held + sum(run.pages for run in runs)
        peer = self._peer_run(stretch, source, own_end)
        runs += [peer] if peer is not None else []
        if not runs:
            return None
        split = best_split(runs, len(ids) - held, self._speeds(source), self._cost.page_s or _UNMEASURED_COMPUTE_S)
        if split.load_pages and (stretch.in_parts or held + split.load_pages == len(ids)):
            return Plan(stretch.first(held + split.load_pages), own_end, source, split.load_s)
        self.figures.not_worth_it += 1
        return None

    def _peer_run(self, stretch: Stretch, source: KvSource | None, own_end: int) -> Run | None:
        if self._pulls is None or not stretch.in_parts:
            return None
        return self._pulls.run(source, own_end, len(stretch.ids))

    def _speeds(self, source: KvSource | None) -> dict[str, Speed]:
        peer = {PEER_TIER: self._pulls.speed_of(source)} if self._pulls is not None else {}
        return {**self._store.speeds, **peer}

    def _load_failed(self, command: Submit, error: PdserveError) -> None:
        log.warning("load_failed", request_id=command.work.request_id, reason=error.reason, message=error.message)
        self._enter(command)

    def _enter(self, command: Submit) -> None:
        """Once: a load may still fail after it."""
        waiting = self._waiting.pop(command.work.dispatch, None)
        if waiting is None:
            return
        self._send(command)
        for choices in waiting.cancelled:
            self._send(Cancel(command.work.dispatch, choices))

    def _send(self, command: Submit | Cancel | PagesSaved | PagesLate) -> None:
        """Without effect once the engine is gone: the node ends then."""
        try:
            self._engine.send(command)
        except WorkerLost as lost:
            log.debug("engine_gone", message=lost.message)
