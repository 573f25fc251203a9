"""Owns the decode worker's side of hand-offs: HandoffReceiver grants reservations and serves HandoffService."""

from __future__ import annotations

import asyncio
import hmac
import random
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping

import grpc

from kv_transfer.accepted import AcceptedConnections
from kv_transfer.incoming import Answers, IncomingHandoff, IncomingParts
from kv_transfer.layout import KvIdentity, check_identity, groups_from_proto, plan_transfer
from kv_transfer.leases import DispatchKey
from kv_transfer.outbox import Outbox
from kv_transfer.reservation import Destination, FencedBlocks, ReceivedReport, ReceiverCounters, Reservation
from kv_transfer.segment_rules import SegmentRules
from kv_transfer.side import KvSide
from kv_transfer.tags import TagAllocator
from kv_transfer.transport import Connection, Transport
from pdserve.errors import (
    ConfigInvalid,
    InternalError,
    LayoutMismatch,
    LeaseExpired,
    PdserveError,
    PermissionRefused,
    TransferFailed,
)
from pdserve.v1 import handoff_pb2, handoff_pb2_grpc, types_pb2, worker_pb2
from service_kit.config import TransferConfig
from service_kit.logs import get_logger

_log = get_logger(__name__)

__all__ = ["Destination", "HandoffReceiver", "ReceivedReport", "ReceiverCounters", "Reservation"]

TICKET_BYTES = 16
MAX_RESERVATIONS = 65536

_OnConnection = Callable[[Connection, bytes], Coroutine[object, object, None]]


class HandoffReceiver(handoff_pb2_grpc.HandoffServiceServicer):
    """One per worker. `start`, then `reserve` per granted hand-off; register it as servicer of HandoffService."""

    def __init__(
        self,
        side: KvSide,
        transports: Mapping[str, Transport],
        config: TransferConfig,
        destination: Destination,
    ) -> None:
        self._side = side
        self._transports = transports
        self._config = config
        self.counters = ReceiverCounters()
        plan = plan_transfer(side.groups, side.groups)
        self._parts = IncomingParts(side.arena, plan, config, destination, self.counters)
        self._accepted = AcceptedConnections(config.connect_s)
        self._endpoints: dict[str, types_pb2.KvEndpoint] = {}
        self._tags = TagAllocator(side.incarnation, random.Random(secrets.randbits(128)))
        self._held: dict[DispatchKey, tuple[IncomingHandoff, bytes]] = {}
        self._fenced = FencedBlocks()

    async def start(self) -> tuple[types_pb2.KvEndpoint, ...]:
        """Listens on every transport; returns where."""
        for name, transport in self._transports.items():
            address = await transport.listen(self._on_connection(name))
            self._endpoints[name] = types_pb2.KvEndpoint(transport=name, address=address)
        return tuple(self._endpoints.values())

    def _on_connection(self, transport: str) -> _OnConnection:
        async def add(connection: Connection, hello: bytes) -> None:
            await self._accepted.add(transport, connection, hello)

        return add

    @property
    def held(self) -> int:
        """Reservations whose writer has not ended."""
        return len(self._held)

    # ---- what the worker says

    def reserve(self, reservation: Reservation, transport: str) -> worker_pb2.Grant:
        """Grants `reservation` to whoever shows the ticket, until its lease expires. The blocks stay fenced until
        `Destination` hears of the end. Raises ConfigInvalid (unknown transport), InternalError (block still fenced)."""
        endpoint = self._endpoints.get(transport)
        if endpoint is None:
            raise ConfigInvalid(f"This worker has no KV endpoint for transport {transport!r}.")
        plan = self._parts.plan
        blocks = reservation.blocks
        if len(blocks) != plan.blocks_for(reservation.token_count) or len(blocks) != len(reservation.generations):
            raise InternalError(f"{len(blocks)} blocks were reserved for {reservation.token_count} tokens.")
        if reservation.dispatch in self._held or len(self._held) >= MAX_RESERVATIONS:
            raise InternalError(f"Dispatch {reservation.dispatch} holds a reservation already, or there are too many.")
        first_block = plan.cached_blocks(reservation.cached_tokens)
        self._fenced.fence(blocks[first_block:], reservation.generations[first_block:])
        tags = self._tags.allocate(max(1, plan.layers * (len(blocks) - first_block)))
        ticket = secrets.token_bytes(TICKET_BYTES)
        rules = SegmentRules(plan, blocks, first_block, tags)

        def forget() -> None:
            del self._held[reservation.dispatch]
            self._fenced.release(blocks[first_block:])

        incoming = IncomingHandoff(reservation, rules, transport, self._parts, forget)
        self._held[reservation.dispatch] = (incoming, ticket)
        return worker_pb2.Grant(
            dispatch=types_pb2.DispatchId(
                request_key=reservation.dispatch.request_key, attempt=reservation.dispatch.attempt
            ),
            ticket=ticket,
            lease_ms=round(self._config.lease_s * 1000),
            endpoint=endpoint,
            first_tag=tags.first,
            tag_count=tags.count,
            cached_tokens=reservation.cached_tokens,
            identity=self._side.identity.to_proto(),
            layout=[group.to_proto() for group in self._side.groups],
        )

    def revoke(self, dispatch: DispatchKey, error: PdserveError) -> None:
        """Fences the writer of `dispatch`; `Destination.writer_done` follows. Unknown or ended dispatches: no effect."""
        if (entry := self._held.get(dispatch)) is not None:
            entry[0].stop(error)

    async def close(self) -> None:
        for incoming, _ in tuple(self._held.values()):
            await incoming.close()
        await self._accepted.close()

    # ---- the service

    async def Handoff(  # noqa: N802 (the name of the RPC)
        self,
        request_iterator: AsyncIterator[handoff_pb2.HandoffRequest],
        context: grpc.aio.ServicerContext[handoff_pb2.HandoffRequest, handoff_pb2.HandoffResponse],
    ) -> AsyncIterator[handoff_pb2.HandoffResponse]:
        answers: Answers = Outbox()
        session = _Session(self, self._config.connect_s, answers)
        reader = asyncio.create_task(session.read(request_iterator), name="handoff-session")
        try:
            async for answer in answers:
                yield answer
        finally:
            reader.cancel()
            session.lost()

    def find(self, begin: handoff_pb2.Begin) -> IncomingHandoff:
        """The hand-off whose ticket `begin` shows."""
        dispatch = DispatchKey(begin.dispatch.request_key, begin.dispatch.attempt)
        entry = self._held.get(dispatch)
        if entry is None:
            raise LeaseExpired(f"No reservation of dispatch {dispatch} is held here: expired, revoked or never made.")
        incoming, ticket = entry
        if not hmac.compare_digest(ticket, begin.ticket):
            raise PermissionRefused("The ticket is not the one of this reservation.")
        return incoming

    async def attach(self, begin: handoff_pb2.Begin, incoming: IncomingHandoff) -> None:
        """Checks what `begin` says of its side, and ties its data connection to `incoming`."""
        try:
            self._check_begin(begin, incoming)
            connection = await self._accepted.claim(begin.transport, begin.connection)
        except PdserveError as error:
            incoming.dismiss(error)
        else:
            incoming.attach(connection)

    def _check_begin(self, begin: handoff_pb2.Begin, incoming: IncomingHandoff) -> None:
        check_identity(KvIdentity.from_proto(begin.identity), self._side.identity)
        plan_transfer(groups_from_proto(begin.layout), self._side.groups)
        if begin.transport != incoming.transport:
            raise TransferFailed(f"The grant is for {incoming.transport}, Begin names {begin.transport!r}.")
        if begin.token_count != incoming.reservation.token_count:
            raise LayoutMismatch(
                f"KV of {begin.token_count} tokens was announced, {incoming.reservation.token_count} were reserved."
            )


class _Session:
    """One stream: its first message must be a Begin, in time; its end is told to the hand-off."""

    def __init__(self, receiver: HandoffReceiver, begin_s: float, answers: Answers) -> None:
        self._receiver = receiver
        self._begin_s = begin_s
        self._answers = answers
        self._incoming: IncomingHandoff | None = None

    async def read(self, requests: AsyncIterator[handoff_pb2.HandoffRequest]) -> None:
        try:
            await self._serve(requests)
        except PdserveError as error:
            self._refuse(error)
        except Exception as error:
            _log.warning("handoff_stream_malformed", error=repr(error))
            self._refuse(TransferFailed("The hand-off's stream cannot be read."))
        finally:
            self.lost()

    async def _serve(self, requests: AsyncIterator[handoff_pb2.HandoffRequest]) -> None:
        try:
            async with asyncio.timeout(self._begin_s):
                first = await anext(requests, None)
        except TimeoutError:
            raise TransferFailed(f"No Begin came in {self._begin_s:g} s.") from None
        if first is None or first.WhichOneof("message") != "begin":
            raise TransferFailed("The first message of a hand-off must be Begin.")
        incoming = self._receiver.find(first.begin)
        if not incoming.begin(first.begin, self._answers):
            self._answers.close()
            return
        self._incoming = incoming
        await self._receiver.attach(first.begin, incoming)
        async for request in requests:
            incoming.on_request(request)
        incoming.on_half_close()

    def _refuse(self, error: PdserveError) -> None:
        self._answers.put(
            handoff_pb2.HandoffResponse(refused=handoff_pb2.Refused(reason=error.reason, message=error.message))
        )
        if self._incoming is None:
            self._answers.close()

    def lost(self) -> None:
        """The stream is over. Without effect on a hand-off that ended."""
        incoming, self._incoming = self._incoming, None
        if incoming is not None and not incoming.ended:
            incoming.cut(TransferFailed("The prefill worker's session was lost."))
