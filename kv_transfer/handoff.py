"""Owns one outgoing hand-off: begin, announce and send segments as blocks become ready, commit, release the source."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kv_transfer.background import BackgroundTasks
from kv_transfer.control_session import ControlSession
from kv_transfer.layout import KvIdentity, TransferPlan, check_identity, groups_from_proto, plan_transfer
from kv_transfer.leases import DispatchKey
from kv_transfer.liveness import BEATS_PER_HEARTBEAT, Liveness
from kv_transfer.peers import PeerLink, Peers
from kv_transfer.pusher import Cutting, SegmentPusher
from kv_transfer.segments import Span
from kv_transfer.side import KvSide
from kv_transfer.source_lease import (
    CloseConnection,
    Delivered,
    Failed,
    PeerHeard,
    PeerLost,
    ReleaseBlocks,
    SendsSettled,
    SourceEvent,
    SourceHeld,
    SourceReleased,
    SourceState,
    SourceTick,
    StopSending,
    source_deadline_s,
    step_source,
)
from kv_transfer.tags import TagRange
from pdserve.errors import PdserveError, TransferFailed, error_from_reason
from pdserve.v1 import handoff_pb2, types_pb2, worker_pb2
from service_kit.config import TransferConfig
from service_kit.logs import get_logger

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class HandoffOrder:
    """What the controller asked for: send the KV of `token_count` tokens to the holder of `grant`."""

    dispatch: DispatchKey
    grant: worker_pb2.Grant
    decode_address: str  # gRPC, host:port
    token_count: int


@dataclass(frozen=True, slots=True)
class HandoffOutcome:
    """How it ended; the source blocks may be reused. exposed_us: from `finish` to activation."""

    dispatch: DispatchKey
    transport: str
    bytes: int
    segments: int
    transfer_us: int  # first byte to last
    exposed_us: int
    error: PdserveError | None  # None: activated, or given back by `abort(None)`
    activated: bool


class Handoff:
    """Methods are called on the event loop and never wait; the end is `await outcome()`."""

    def __init__(self, order: HandoffOrder, side: KvSide, peers: Peers, config: TransferConfig) -> None:
        self._order = order
        self._side = side
        self._peers = peers
        self._config = config
        loop = asyncio.get_running_loop()
        grace_s = config.heartbeat_s * 2
        self._lease: SourceState = SourceHeld(time.monotonic() + config.lease_s, config.lease_s, grace_s)
        self._grace_s = grace_s
        self._liveness = Liveness(config.heartbeat_misses)
        self._accepted: asyncio.Future[handoff_pb2.Accepted] = loop.create_future()
        self._stopped = asyncio.Event()  # StopSending was commanded
        self._outcome: asyncio.Future[HandoffOutcome] = loop.create_future()
        tags = TagRange(order.grant.first_tag, order.grant.tag_count)
        self._pusher = SegmentPusher(side.arena, tags, self._put, lambda error: self._apply(Failed(error)))
        self._link: PeerLink | None = None
        self._session: ControlSession | None = None
        self._aborting = False
        self._activated = False
        self._silent = False
        self._tasks = BackgroundTasks()
        self._finish_s = self._end_s = 0.0

    # ---- what the worker says

    def source_blocks(self, block_ids: Sequence[int]) -> None:
        """The request's block table here; known when the engine starts it. All of the prompt's blocks at once."""
        self._pusher.source_blocks(block_ids)

    def kv_ready(self, layer: int, first_block: int, block_count: int) -> None:
        """Blocks (ordinals in the block table) of `layer` are final: they are sent as soon as the window allows."""
        self._pusher.ready(Span(layer, first_block, block_count))

    def finish(self, first_tokens: Sequence[tuple[int, int]]) -> None:
        """All KV was announced; (choice, token id) of the choices that go on. Commits after the last segment."""
        self._finish_s = time.monotonic()
        self._pusher.finish(first_tokens)

    def abort(self, error: PdserveError | None) -> None:
        """Ends the hand-off. None: there is nothing to hand off (the first token ended the request)."""
        if isinstance(self._lease, SourceHeld):
            self._aborting = True
            self._apply(Failed(error))

    async def outcome(self) -> HandoffOutcome:
        """Waits for the end: bounded by the lease once the peer is silent. May be awaited by several."""
        return await asyncio.shield(self._outcome)

    # ---- the task

    async def run(self) -> None:
        """From connect to release. Never raises a PdserveError: it is in the outcome."""
        try:
            drive = self._tasks.spawn(self._drive(), "handoff-drive")
            self._tasks.spawn(self._beat(), "handoff-beat")
            await self._stopped.wait()
            self._end_s = time.monotonic()
            if self._aborting and not self._accepted.done():
                # Only a session that has begun can give the reservation back; else it would block until its lease expires.
                await asyncio.wait((drive,), timeout=self._config.connect_s)
            drive.cancel()
            await asyncio.wait((drive,))
            await self._settle()
            await self._part()
        finally:
            await self._tasks.close()
            if self._session is not None:
                await self._session.close()
            self._pusher.return_credits()
            if not self._outcome.done():
                self._outcome.set_result(self._describe())

    async def _drive(self) -> None:
        try:
            plan = _plan(self._order.grant, self._side)
            self._link = await self._peers.link(self._order.grant.endpoint)
            if self._stopped.is_set() and not self._aborting:
                return
            accepted = await self._begin(self._link)
            if self._stopped.is_set():
                return
            cutting = _cutting(plan, self._order, tuple(accepted.runs), self._config.max_message_bytes)
            await self._pusher.push(plan, cutting, self._link)
        except PdserveError as error:
            self._apply(Failed(error))

    async def _begin(self, link: PeerLink) -> handoff_pb2.Accepted:
        session = ControlSession(self._peers.channel(self._order.decode_address), self._on_answer, self._on_lost)
        self._session = session
        begin = _begin_message(self._order, self._side, link.hello)
        session.put(handoff_pb2.HandoffRequest(begin=begin))
        try:
            async with asyncio.timeout(self._config.connect_s):
                return await self._accepted
        except TimeoutError:
            raise TransferFailed(
                f"The decode worker at {self._order.decode_address} did not answer Begin in {self._config.connect_s} s."
            ) from None

    # ---- what the peer says

    def _on_answer(self, answer: handoff_pb2.HandoffResponse) -> None:
        self._liveness.heard()
        self._apply(PeerHeard())
        match answer.WhichOneof("message"):
            case "accepted":
                if not self._accepted.done():
                    self._accepted.set_result(answer.accepted)
            case "segment_done":
                self._pusher.confirmed(answer.segment_done.tag)
            case "activated":
                self._activated = isinstance(self._lease, SourceHeld)
                self._apply(Delivered())
            case "refused":
                error = error_from_reason(answer.refused.reason, answer.refused.message)
                self._never_accepted(error)
                self._apply(Failed(error))
            case "heartbeat" | "released" | None:
                pass

    def _never_accepted(self, error: PdserveError) -> None:
        if not self._accepted.done():
            self._accepted.set_exception(error)
            self._accepted.exception()  # retrieved: nobody may be waiting

    def _on_lost(self, error: PdserveError) -> None:
        self._never_accepted(error)
        self._apply(PeerLost(error))

    async def _beat(self) -> None:
        """Heartbeats out, silence in, and the lease's clock."""
        while True:
            await asyncio.sleep(self._config.heartbeat_s / BEATS_PER_HEARTBEAT)
            if self._accepted.done():
                self._put(handoff_pb2.HandoffRequest(heartbeat=handoff_pb2.Heartbeat()))
                if not self._liveness.beat():
                    self._silent = True
                    if self._session is not None:
                        self._session.ended.set()
                    self._apply(PeerLost(TransferFailed("The decode worker is silent: no heartbeat.")))
            elif self._session is None:
                # Not begun: the connect has its own deadline, the lease is not the peer's to renew yet.
                self._apply(PeerHeard())
            if self._pusher.stalled_s() > self._config.lease_s:
                self._apply(Failed(TransferFailed(f"No KV message was confirmed for {self._config.lease_s:g} s.")))
            self._apply(SourceTick())

    # ---- the end

    def _apply(self, event: SourceEvent) -> None:
        self._lease, commands = step_source(self._lease, event, time.monotonic())
        for command in commands:
            match command:
                case StopSending():
                    self._stopped.set()
                case CloseConnection():
                    self._tasks.spawn(self._close_link(), "handoff-close-link")
                case ReleaseBlocks():
                    pass  # `run` goes on to the outcome

    async def _settle(self) -> None:
        """Until no send reads the blocks: they end by themselves, or by the close of the connection."""
        while self._pusher.sends:
            deadline_s = source_deadline_s(self._lease)
            assert deadline_s is not None
            await asyncio.wait(self._pusher.sends, timeout=max(0.0, deadline_s - time.monotonic()))
            if self._pusher.sends:
                self._apply(SourceTick())
        self._apply(SendsSettled())

    async def _part(self) -> None:
        """Says FIN and waits for the peer's last word; a peer that gives none loses the connection."""
        session = self._session
        if self._silent:
            await self._close_link()
        if session is None or session.ended.is_set():
            return
        if not self._activated:
            # Also in answer to Refused: only an explicit FIN tells the peer that nothing more will be written.
            error = self._lease.error if isinstance(self._lease, SourceReleased) else None
            reason, message = (error.reason, error.message) if error is not None else ("", "")
            self._put(handoff_pb2.HandoffRequest(abort=handoff_pb2.Abort(reason=reason, message=message)))
        session.half_close()
        try:
            # Closing the connection would fail every hand-off that shares it: a busy peer that still talks gets its time.
            async with asyncio.timeout(self._grace_s if self._activated else self._config.lease_s):
                await session.ended.wait()
        except TimeoutError:
            if not self._activated:
                await self._close_link()
        if self._silent:
            await self._close_link()

    async def _close_link(self) -> None:
        if self._link is not None:
            if not self._link.connection.closed:
                _log.warning("kv_link_closed", endpoint=self._order.grant.endpoint.address, silent=self._silent)
            # Also where the peer closed it first: only a close on this side lets go of sends that do not end.
            await self._link.connection.close()

    def _put(self, request: handoff_pb2.HandoffRequest) -> None:
        if self._session is not None:
            self._session.put(request)

    def _describe(self) -> HandoffOutcome:
        error = (
            self._lease.error if isinstance(self._lease, SourceReleased) else TransferFailed("The sender was closed.")
        )
        return HandoffOutcome(
            dispatch=self._order.dispatch,
            transport=self._order.grant.endpoint.transport,
            bytes=self._pusher.bytes,
            segments=self._pusher.segments,
            transfer_us=_microseconds(self._pusher.first_send_s, self._pusher.last_done_s),
            exposed_us=_microseconds(self._finish_s, self._end_s) if self._activated else 0,
            error=error,
            activated=self._activated,
        )


def _plan(grant: worker_pb2.Grant, side: KvSide) -> TransferPlan:
    check_identity(side.identity, KvIdentity.from_proto(grant.identity))
    return plan_transfer(side.groups, groups_from_proto(grant.layout))


def _begin_message(order: HandoffOrder, side: KvSide, hello: bytes) -> handoff_pb2.Begin:
    return handoff_pb2.Begin(
        ticket=order.grant.ticket,
        dispatch=types_pb2.DispatchId(request_key=order.dispatch.request_key, attempt=order.dispatch.attempt),
        incarnation=side.incarnation,
        worker_id=side.worker_id,
        transport=order.grant.endpoint.transport,
        identity=side.identity.to_proto(),
        layout=[group.to_proto() for group in side.groups],
        token_count=order.token_count,
        connection=hello,
    )


def _cutting(plan: TransferPlan, order: HandoffOrder, runs: tuple[int, ...], max_message_bytes: int) -> Cutting:
    return Cutting(
        blocks=plan.blocks_for(order.token_count),
        first_block=plan.cached_blocks(order.grant.cached_tokens),
        runs=runs,
        max_blocks=max(1, max_message_bytes // plan.block_bytes),
    )


def _microseconds(start_s: float, end_s: float) -> int:
    return max(0, round((end_s - start_s) * 1e6)) if start_s else 0
