"""Owns what this worker lends: pages of its device and its tiers, pinned in the pool and pushed to the peers that ask for them.

    Pull --all there?--> LoadPages("lend") --> read what only the tiers have --> hand-off --outcome--> PagesLoaded

Whatever ends a loan, its pins go with it: the hand-off is bounded by the source lease. What was read from the tiers enters the
device's index, as after a load of our own.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from engine.page_protocol import PagesOpened
from kv_transfer.keys import HASH_BYTES, HASH_UNIT_TOKENS, TOKEN_BYTES
from kv_transfer.layout import KvIdentity, check_identity, groups_from_proto, plan_transfer
from pdserve.errors import Cancelled, DeadlineExceeded, InvalidRequest, NoCapacity, PdserveError
from pdserve.v1 import kv_pull_pb2, kv_pull_pb2_grpc
from service_kit.logs import get_logger
from worker_runtime.kv_endpoint import KvEndpoint
from worker_runtime.messages import MAX_NAME_CHARS, MAX_TENANT_BYTES, MAX_WORK_TOKENS
from worker_runtime.page_openings import PageOpenings
from worker_runtime.stretches import Stretch, StretchCutter
from worker_runtime.tier_reads import TierReads

LOANS_PER_PEER = 4
LENT_SHARE = 0.25  # of the pool, at most
MAX_DEADLINE_S = 60.0

log = get_logger(__name__)


@dataclass(slots=True)
class LoanFigures:
    """Since the start."""

    lent_tokens: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by reason


@dataclass(slots=True)
class _Ask:
    """A request whose every field was checked."""

    peer: str
    address: str
    stretch: Stretch
    first_page: int
    deadline_s: float

    @property
    def pages(self) -> int:
        return len(self.stretch.ids)


class PageLoans(kv_pull_pb2_grpc.KvPullServiceServicer):
    """holds(unit key): whether the engine's prefix index has it, as far as this process knows."""

    def __init__(
        self,
        kv: KvEndpoint,
        openings: PageOpenings,
        reads: TierReads,
        cutter: StretchCutter,
        holds: Callable[[bytes], bool],
    ) -> None:
        self.figures = LoanFigures()
        self._kv = kv
        self._openings = openings
        self._reads = reads
        self._cutter = cutter
        self._holds = holds
        self._page_tokens = kv.side.groups[0].page_tokens
        self._blocks_left = int(LENT_SHARE * kv.side.arena.layout.blocks)
        self._loans: Counter[str] = Counter()  # by peer
        self._running: set[asyncio.Task[int]] = set()

    async def Pull(  # noqa: N802 (the name of the RPC)
        self,
        request: kv_pull_pb2.PullRequest,
        context: grpc.aio.ServicerContext[kv_pull_pb2.PullRequest, kv_pull_pb2.PullResponse],
    ) -> kv_pull_pb2.PullResponse:
        # Not cancelled with the call: a read in a thread and a hand-off end in their own time, and then the pins go.
        task = asyncio.create_task(self._lend(request), name="kv-loan")
        self._running.add(task)
        task.add_done_callback(self._ended)
        return kv_pull_pb2.PullResponse(pages=await asyncio.shield(task))

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        self._reads.close()

    # ---- parts

    def _ended(self, task: asyncio.Task[int]) -> None:
        """Here, because whoever asked may be gone."""
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, PdserveError):
            self.figures.failed[error.reason] += 1
            log.info("loan_failed", reason=error.reason, message=error.message)
        elif error is not None:
            log.exception("loan_failed", error)

    def _checked(self, request: kv_pull_pb2.PullRequest) -> _Ask:
        """Raises LayoutMismatch where the two sides cannot exchange KV, InvalidRequest where the request is none."""
        side, tokens = self._kv.side, len(request.token_ids) // TOKEN_BYTES
        check_identity(side.identity, KvIdentity.from_proto(request.grant.identity))
        plan_transfer(side.groups, groups_from_proto(request.grant.layout))
        _check(0 < len(request.worker_id) <= MAX_NAME_CHARS, "worker_id", f"needs 1 to {MAX_NAME_CHARS} characters")
        _check(0 < len(request.address) <= MAX_NAME_CHARS, "address", f"needs 1 to {MAX_NAME_CHARS} characters")
        _check(0 < tokens <= MAX_WORK_TOKENS, "token_ids", f"must hold 1 to {MAX_WORK_TOKENS} tokens")
        whole = len(request.token_ids) % (self._page_tokens * TOKEN_BYTES) == 0
        _check(whole, "token_ids", f"must be whole pages of {self._page_tokens} tokens")
        keyed = len(request.block_hashes) >= tokens // HASH_UNIT_TOKENS * HASH_BYTES
        _check(keyed and len(request.block_hashes) % HASH_BYTES == 0, "block_hashes", "must name all of the tokens")
        _check(len(request.tenant) <= MAX_TENANT_BYTES, "tenant", f"exceeds {MAX_TENANT_BYTES} bytes")
        pages = tokens // self._page_tokens
        _check(request.first_page < pages, "first_page", "must lie within token_ids")
        stretch = self._cutter.cut(request.token_ids, request.block_hashes, request.tenant, pages)
        deadline_s = time.monotonic() + min(request.deadline_ms / 1000, MAX_DEADLINE_S)
        return _Ask(request.worker_id, request.address, stretch, request.first_page, deadline_s)

    async def _lend(self, request: kv_pull_pb2.PullRequest) -> int:
        """Pages that were handed over, or could be."""
        ask = self._checked(request)
        if self._loans[ask.peer] >= LOANS_PER_PEER:
            raise NoCapacity(f"{LOANS_PER_PEER} pulls of worker {ask.peer} run here already.")
        self._loans[ask.peer] += 1
        try:
            possible = min(await self._reach(ask.stretch), self._blocks_left)
            if possible < ask.pages:
                return self._fewer(ask, possible)
            self._blocks_left -= ask.pages
            try:
                return await self._lend_pinned(request, ask)
            finally:
                self._blocks_left += ask.pages
        finally:
            self._loans[ask.peer] -= 1
            self._loans += Counter()  # forgets those at zero

    def _fewer(self, ask: _Ask, possible: int) -> int:
        if possible > ask.first_page or self._blocks_left > ask.first_page:
            return max(0, possible - ask.first_page)
        raise NoCapacity(f"Only {self._blocks_left} KV blocks may be lent to peers now.")

    async def _reach(self, stretch: Stretch) -> int:
        """How many pages of `stretch` are on the device or in the tiers, from its first one on."""
        ids = stretch.ids
        held = next((at for at, page in enumerate(ids) if not self._holds(page.key)), len(ids))
        runs = await self._reads.locate(ids[held:]) if held < len(ids) else []
        return held + sum(run.pages for run in runs)

    async def _lend_pinned(self, request: kv_pull_pb2.PullRequest, ask: _Ask) -> int:
        opened = await self._openings.open(ask.stretch.to_lend, ask.deadline_s)
        if opened is None:
            raise DeadlineExceeded("The engine opened no pages in time.")
        good = 0
        try:
            good = await self._read(ask, opened)
            blocks = (*opened.held, *opened.blocks[:good])
            if len(blocks) < ask.pages:
                if not opened.held and not opened.blocks:
                    raise NoCapacity("The KV pool has no room for pages that only the tiers have.")
                return max(0, len(blocks) - ask.first_page)
            if time.monotonic() >= ask.deadline_s:
                raise DeadlineExceeded("The pages were read too late.")
            await self._hand_over(request, blocks[ask.first_page :])
            return ask.pages - ask.first_page
        finally:
            self._openings.end(opened.load_id, good)

    async def _read(self, ask: _Ask, opened: PagesOpened) -> int:
        if not opened.blocks:
            return 0
        report = await self._reads.load(ask.stretch.ids[opened.first_page :], opened.blocks, ask.deadline_s)
        return report.good

    async def _hand_over(self, request: kv_pull_pb2.PullRequest, blocks: tuple[int, ...]) -> None:
        outcome = await self._kv.send_pages(blocks, request.grant, request.address).outcome()
        if outcome.error is not None:
            raise outcome.error
        if not outcome.activated:
            raise Cancelled("The hand-off was given up.")
        self.figures.lent_tokens += len(blocks) * self._page_tokens


def _check(holds: bool, param: str, what: str) -> None:
    if not holds:
        raise InvalidRequest(f"{param} {what}.", param=param)
