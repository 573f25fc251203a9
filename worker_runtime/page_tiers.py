"""Owns the worker's tiers: saves what the engine offers, and loads what a prompt finds there before its work is submitted.

                      nothing to load
    submit(work) ------------------------------------------------> Submit
        |                                                            ^
        +-- LoadPages --> PagesOpened --> load in a thread --> PagesLoaded
                                              |                      ^
                                              +-- deadline: Submit --+  (its blocks stay open until the thread is done)

A load that fails, comes late or comes short changes nothing but what is computed: pages that were verified enter the prefix
index, the rest of the prompt is prefilled.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from engine.prefix_index import KeyChain, PageKey
from engine.protocol import (
    Cancel,
    ChunkSpan,
    Dispatch,
    EngineReady,
    KvOffered,
    LoadPages,
    OfferPages,
    PagesLoaded,
    PagesOpened,
    PagesSaved,
    Submit,
    Work,
)
from kv_store.page import Page, PageBytes, PageFormat, PageId
from kv_store.split import Speed, best_split
from kv_store.tier import Change, TierListener
from kv_store.tiered_store import LoadReport, TieredStore
from kv_transfer.keys import HASH_BYTES, HASH_UNIT_TOKENS, TOKEN_BYTES, fingerprint_seed, padded_chunk
from pdserve.errors import PdserveError, WorkerLost
from service_kit.config import StoreConfig
from service_kit.logs import get_logger
from worker_runtime.engine_link import EngineLink
from worker_runtime.session import SessionHub
from worker_runtime.task_owner import TaskOwner

LOAD_THREADS = 2
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


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Whole pages that may be loaded one after the other: the beginning of a prompt, or a chunk. keys: of its hash units. in_parts:
    the first of them are worth loading without the others."""

    token_ids: bytes
    keys: bytes
    tenant: bytes
    pages: list[PageKey]
    in_parts: bool


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
    """holds(unit key): whether the engine's prefix index has it, as far as this process knows."""

    def __init__(
        self,
        store: TieredStore,
        engine: EngineLink,
        config: StoreConfig,
        tasks: TaskOwner,
        holds: Callable[[bytes], bool],
    ) -> None:
        layout = engine.ready.layout
        self.figures = LoadFigures()
        self.compute = Speed(_UNMEASURED_COMPUTE_S)
        self._store = store
        self._engine = engine
        self._config = config
        self._tasks = tasks
        self._holds = holds
        self._page_tokens = layout.page_tokens
        self._seed = fingerprint_seed(engine.ready.identity)
        flat: PageBytes = np.frombuffer(engine.arena.whole(), dtype=np.uint8)
        self._arena = flat.reshape(layout.layers, layout.blocks, layout.block_bytes)
        self._savers = ThreadPoolExecutor(1, "kv-save")
        self._loaders = ThreadPoolExecutor(LOAD_THREADS, "kv-load")
        self._waiting: dict[Dispatch, _Waiting] = {}
        self._opened: dict[int, asyncio.Future[PagesOpened]] = {}
        self._next_load = 1
        engine.send(OfferPages(max(1, int(config.offered_share * layout.blocks))))

    # ---- saving

    def offered(self, event: KvOffered) -> None:
        self.figures.offers_skipped += event.skipped
        if not event.pages:
            return
        saving = self.compute.page_s if self.compute.samples else 0.0
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
        waiter = self._opened.pop(event.load_id, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(event)
        else:
            self._send(PagesLoaded(event.load_id, 0))

    def computed(self, tokens: int, seconds: float) -> None:
        """A prefill computed so many tokens: what a load competes with."""
        self.compute.measured(tokens // self._page_tokens, seconds)

    def close(self) -> None:
        self._loaders.shutdown(wait=False, cancel_futures=True)
        self._savers.shutdown(wait=False, cancel_futures=True)
        self._store.close()

    # ---- parts

    def _missing(self, work: Work) -> list[_Stretch]:
        """What may be reused of the prompt and is not on the device, as far as this process knows."""
        if work.sampling.prompt_logprobs is not None:
            return []
        stretches = [self._chunk(work, chunk) for chunk in work.chunks] if work.blend else [self._prefix(work)]
        return [stretch for stretch in stretches if stretch.pages and not self._holds(stretch.pages[-1].key)]

    def _prefix(self, work: Work) -> _Stretch:
        # The last token is always computed, for its logits; pages beyond the given keys are looked up by nobody.
        given_tokens = len(work.block_hashes) // HASH_BYTES * HASH_UNIT_TOKENS
        count = min(len(work.token_ids) // TOKEN_BYTES - 1, given_tokens) // self._page_tokens
        return self._stretch(work.token_ids, work.block_hashes, work.tenant, count, in_parts=True)

    def _chunk(self, work: Work, chunk: ChunkSpan) -> _Stretch:
        content = work.token_ids[chunk.start * TOKEN_BYTES : (chunk.start + chunk.count) * TOKEN_BYTES]
        padded = padded_chunk(content, self._page_tokens)
        count = len(padded) // TOKEN_BYTES // self._page_tokens
        return self._stretch(padded, chunk.keys, work.tenant, count, in_parts=False)

    def _stretch(self, token_ids: bytes, keys: bytes, tenant: bytes, count: int, *, in_parts: bool) -> _Stretch:
        tokens = array("i", token_ids[: count * self._page_tokens * TOKEN_BYTES])
        pages = KeyChain(self._page_tokens, keys, self._seed).pages(tokens, count)
        return _Stretch(tokens.tobytes(), keys, tenant, pages, in_parts)

    async def _load_and_submit(self, command: Submit, stretches: Sequence[_Stretch]) -> None:
        deadline_s = time.monotonic() + self._config.load_deadline_s
        for stretch in stretches:
            await self._load_stretch(stretch, deadline_s)
        self._enter(command)

    async def _load_stretch(self, stretch: _Stretch, deadline_s: float) -> None:
        held = next((at for at, page in enumerate(stretch.pages) if not self._holds(page.key)), len(stretch.pages))
        ids = [PageId(page.key, page.fingerprint) for page in stretch.pages]
        self.figures.queried_tokens += (len(ids) - held) * self._page_tokens
        loop = asyncio.get_running_loop()
        runs = await loop.run_in_executor(self._loaders, self._store.locate, ids[held:])
        if not runs:
            return
        split = best_split(runs, len(ids) - held, self._store.speeds, self.compute.page_s)
        if split.load_pages and (stretch.in_parts or held + split.load_pages == len(ids)):
            await self._load(stretch, ids[: held + split.load_pages], deadline_s)
        else:
            self.figures.not_worth_it += 1

    async def _load(self, stretch: _Stretch, ids: Sequence[PageId], deadline_s: float) -> None:
        opened = await self._open(stretch, len(ids), deadline_s)
        if opened is None or not opened.blocks:
            self.figures.no_room += 1
            if opened is not None:
                self._send(PagesLoaded(opened.load_id, 0))
            return
        into = [self._arena[:, block] for block in opened.blocks]
        loop = asyncio.get_running_loop()
        started_s = time.monotonic()
        loading = loop.run_in_executor(self._loaders, self._store.load, ids[opened.first_page :], into, deadline_s)
        loading.add_done_callback(lambda done: self._loaded(opened.load_id, done))
        await asyncio.wait([loading], timeout=max(0.0, deadline_s - started_s) + STUCK_GRACE_S)
        self.figures.load_s += time.monotonic() - started_s
        self.figures.late += not loading.done() or loading.result().late

    async def _open(self, stretch: _Stretch, pages: int, deadline_s: float) -> PagesOpened | None:
        load_id, self._next_load = self._next_load, self._next_load + 1
        waiter: asyncio.Future[PagesOpened] = asyncio.get_running_loop().create_future()
        self._opened[load_id] = waiter
        token_ids = stretch.token_ids[: pages * self._page_tokens * TOKEN_BYTES]
        self._engine.send(LoadPages(load_id, token_ids, stretch.keys, stretch.tenant))
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline_s - time.monotonic()):
                return await waiter
        except TimeoutError:
            return None  # `opened` gives the blocks back when the answer comes

    def _loaded(self, load_id: int, done: asyncio.Future[LoadReport]) -> None:
        """The thread is done with the blocks, however late."""
        error = None if done.cancelled() else done.exception()
        report = LoadReport() if done.cancelled() or error is not None else done.result()
        if error is not None:
            log.exception("pages_not_loaded", error)
        for tier, pages in report.by_tier.items():
            tokens = pages * self._page_tokens
            self.figures.loaded_tokens[tier] = self.figures.loaded_tokens.get(tier, 0) + tokens
        self._send(PagesLoaded(load_id, report.good))

    def _load_failed(self, command: Submit, error: PdserveError) -> None:
        log.warning("load_failed", request_id=command.work.request_id, reason=error.reason, message=error.message)
        self._enter(command)

    def _enter(self, command: Submit) -> None:
        self._send(command)
        for choices in self._waiting.pop(command.work.dispatch).cancelled:
            self._send(Cancel(command.work.dispatch, choices))

    def _send(self, command: Submit | Cancel | PagesSaved | PagesLoaded) -> None:
        """Without effect once the engine is gone: the node ends then."""
        try:
            self._engine.send(command)
        except WorkerLost as lost:
            log.debug("engine_gone", message=lost.message)
