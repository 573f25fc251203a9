"""Owns the pages that this worker pulls from peers: asks, receives them by an ordinary hand-off, waits until the writer has ended.

    grant over opened blocks --Pull--> the peer pins its pages --hand-off--> activated: good
                                  |                                |
                                  +-- refused, failed, late -------+--> revoke --writer ended--> none is good

The writer of a grant may write until its end, so that nothing is said of the blocks before. A peer that failed is left alone for a
while: waiting for one that does not answer costs more than computing.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc

from engine.protocol import Dispatch, KvSource
from kv_store.backoff import Backoff
from kv_store.split import Run, Speed
from kv_transfer.receiver import ReceivedReport
from pdserve.errors import DeadlineExceeded, PdserveError, TransferFailed
from pdserve.rpc_errors import error_from_rpc
from pdserve.v1 import kv_pull_pb2, kv_pull_pb2_grpc
from service_kit.logs import get_logger
from worker_runtime.kv_endpoint import KvEndpoint
from worker_runtime.pull_speeds import PullSpeeds
from worker_runtime.stretches import Stretch

PEER_TIER = "peer"
GUESSED_BYTES_PER_S = 3e8  # until the first measurement
TRIES = 2  # the second one asks for what the peer has

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class OpenPages:
    """Where pulled pages go: `blocks` wait for the pages of a stretch from `first_page` on."""

    first_page: int
    blocks: Sequence[int]
    generations: Sequence[int]

    def first(self, pages: int) -> OpenPages:
        return OpenPages(self.first_page, self.blocks[:pages], self.generations[:pages])


@dataclass(slots=True)
class PullFigures:
    """Since the start."""

    failed: Counter[str] = field(default_factory=Counter)  # by reason
    speeds: PullSpeeds = field(default_factory=PullSpeeds)


class PagePulls:
    """address: of this worker's gRPC server, known once it is bound. clock: of what pulls took."""

    def __init__(self, kv: KvEndpoint, address: Callable[[], str], clock: Callable[[], float] = time.monotonic) -> None:
        layout = kv.side.groups[0]
        self.figures = PullFigures(speeds=PullSpeeds(layout.layer_count * layout.block_bytes / GUESSED_BYTES_PER_S))
        self._clock = clock
        self._page_tokens = layout.page_tokens
        self._kv = kv
        self._address = address
        self._failing: dict[str, Backoff] = {}  # by worker; one that works is not in it

    def run(self, source: KvSource | None, located: int, wanted: int) -> Run | None:
        """What the peer is said to hold of `wanted` pages beyond the `located` first ones."""
        if source is None:
            return None
        backoff = self._failing.get(source.worker_id)
        pages = min(source.tokens // self._page_tokens, wanted) - located
        if pages <= 0 or (backoff is not None and backoff.off(time.monotonic())):
            return None
        return Run(PEER_TIER, pages)

    def speed_of(self, source: KvSource | None) -> Speed:
        """Of that peer; of all together where there is nothing to believe of it."""
        return self.figures.speeds.of(source, self._clock())

    def computes(self, page_s: float) -> None:
        """What a pull competes with; 0 = not measured yet."""
        if page_s > 0:
            self.figures.speeds.compute_page_s = page_s

    async def pull(self, source: KvSource, stretch: Stretch, into: OpenPages, deadline_s: float) -> int:
        """How many pages are good, from `into.first_page` on. No writer is left when it returns."""
        speeds, started_s = self.figures.speeds, self._clock()
        connected = speeds.connected(source)
        try:
            pages = await self._pull(source, stretch, into, deadline_s)
        except PdserveError as error:
            speeds.disconnect(source)
            self.figures.failed[error.reason] += 1
            self._failing.setdefault(source.worker_id, Backoff()).failed(time.monotonic())
            log.warning("pull_failed", peer=source.worker_id, reason=error.reason, message=error.message)
            return 0
        self._failing.pop(source.worker_id, None)
        if pages:
            now_s = self._clock()
            speeds.connect(source)
            if connected:  # else it took the time to connect too, on both sides
                speeds.measured(source, pages, now_s - started_s, now_s)
        else:
            self.figures.failed["not_found"] += 1  # the controller knew more than there is
        return pages

    async def _pull(self, source: KvSource, stretch: Stretch, into: OpenPages, deadline_s: float) -> int:
        wanted = len(into.blocks)
        for _ in range(TRIES):
            offered = await self._try(source, stretch.first(into.first_page + wanted), into.first(wanted), deadline_s)
            if offered >= wanted:
                return wanted
            wanted = offered
            if not wanted:
                break
        return 0

    async def _try(self, source: KvSource, stretch: Stretch, into: OpenPages, deadline_s: float) -> int:
        """Pages that came, all that were asked for; or how many could be asked for."""
        writer = _Writer()
        grant = self._kv.grant_pages(into.blocks, into.generations, writer)
        dispatch = Dispatch(grant.dispatch.request_key, grant.dispatch.attempt)
        left_s = max(0.0, deadline_s - time.monotonic())
        request = kv_pull_pb2.PullRequest(
            worker_id=self._kv.side.worker_id,
            address=self._address(),
            token_ids=stretch.token_ids,
            block_hashes=stretch.keys,
            first_page=into.first_page,
            grant=grant,
            deadline_ms=round(left_s * 1000),
            tenant=stretch.tenant,
        )
        call = asyncio.create_task(self._call(source.address, request, left_s))
        try:
            await asyncio.wait((call, writer.ended), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            refusal = _why_not(call, source, len(into.blocks))
            self._kv.revoke(dispatch, refusal)  # without effect where the writer has ended
            error = await writer.ended
        finally:
            call.cancel()
        if error is None:
            return len(into.blocks)
        if call.done() and not call.cancelled() and call.exception() is None:
            return min(call.result(), len(into.blocks) - 1)
        raise error

    async def _call(self, address: str, request: kv_pull_pb2.PullRequest, timeout_s: float) -> int:
        stub = kv_pull_pb2_grpc.KvPullServiceStub(self._kv.channel(address))
        try:
            response: kv_pull_pb2.PullResponse = await stub.Pull(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return response.pages


class _Writer:
    """Implements ReservationHolder. ended: None where all pages came."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[PdserveError | None] = asyncio.get_running_loop().create_future()

    def activated(self, first_tokens: tuple[tuple[int, int], ...], report: ReceivedReport) -> None:
        self.ended.set_result(None)

    def writer_ended(self, error: PdserveError | None) -> None:
        self.ended.set_result(error or TransferFailed("The peer gave the pages up."))


def _why_not(call: asyncio.Task[int], source: KvSource, wanted: int) -> PdserveError:
    """What the writer is told if it has not ended by now."""
    if not call.done():
        return DeadlineExceeded(f"Worker {source.worker_id} did not hand {wanted} pages over in time.")
    error = call.exception()
    if isinstance(error, PdserveError):
        return error
    return TransferFailed(f"Worker {source.worker_id} holds fewer than {wanted} pages.")
