"""Owns the worker's KV endpoint: its transports, the sender and the receiver of hand-offs, and the way back to the engine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import grpc

from engine.protocol import Activate, Dispatch, EngineReady, Reserved, Work, WriterDone
from kv_transfer.keys import TOKEN_BYTES
from kv_transfer.layout import KvIdentity, LayoutGroup
from kv_transfer.leases import DispatchKey
from kv_transfer.peers import OpenChannel
from kv_transfer.receiver import HandoffReceiver, ReceivedReport, Reservation
from kv_transfer.sender import Handoff, HandoffOrder, HandoffSender
from kv_transfer.side import KvSide
from kv_transfer.transport import Transport
from kv_transfer.transports import open_transport, resolve
from pdserve.errors import PdserveError
from pdserve.v1 import types_pb2, worker_pb2
from service_kit.config import TransferConfig
from worker_runtime.engine_link import EngineLink
from worker_runtime.load import ReceiverFigures

PULL_ATTEMPT = 0  # of reservations for pages that are pulled: controllers count attempts from 1


class ReservationHolder(Protocol):
    """Who hears how the writer of a reservation ended; exactly one of the two, once, after the engine was told, which only hears of
    dispatches."""

    def activated(self, first_tokens: tuple[tuple[int, int], ...], report: ReceivedReport) -> None: ...

    def writer_ended(self, error: PdserveError | None) -> None:
        """The request must not run. None: the prefill worker gave the reservation back."""


def kv_side(ready: EngineReady, worker_id: str, incarnation: int, engine: EngineLink) -> KvSide:
    layout = ready.layout
    return KvSide(
        worker_id=worker_id,
        incarnation=incarnation,
        identity=KvIdentity(
            digest=ready.identity,
            model=ready.model,
            kv_dtype=layout.dtype,
            layers=layout.layers,
            kv_heads=layout.kv_heads,
            head_dim=layout.head_dim,
        ),
        groups=(
            LayoutGroup(
                page_tokens=layout.page_tokens,
                layer_count=layout.layers,
                head_count=layout.kv_heads,
                block_bytes=layout.block_bytes,
            ),
        ),
        arena=engine.arena,
    )


def open_transports(config: TransferConfig, host: str) -> dict[str, Transport]:
    """ "auto" opens every transport that works here, so that a dispatch may name either; a named one is opened alone."""
    best = resolve(config.transport, config.profile)
    names = [best] if config.transport != "auto" or best == "tcp" else [best, "tcp"]
    return {name: open_transport(name, config, host) for name in names}


class KvEndpoint:
    def __init__(
        self,
        side: KvSide,
        transports: dict[str, Transport],
        config: TransferConfig,
        engine: EngineLink,
        open_channel: OpenChannel,
    ) -> None:
        self.side = side
        self._transports = transports
        self._destination = _EngineDestination(engine)
        self.receiver = HandoffReceiver(side, transports, config, self._destination)
        self._sender = HandoffSender(side, transports, config, open_channel)
        self._pulls = itertools.count(1)
        self.endpoints: tuple[types_pb2.KvEndpoint, ...] = ()

    async def start(self) -> None:
        self.endpoints = await self.receiver.start()

    async def close(self) -> None:
        await self._sender.close()
        await self.receiver.close()
        for transport in self._transports.values():
            await transport.close()

    def figures(self) -> ReceiverFigures:
        counters = self.receiver.counters
        return ReceiverFigures(counters.verify_failures, counters.expired_leases)

    def grant(self, work: Work, reserved: Reserved, transport: str, holder: ReservationHolder) -> worker_pb2.Grant:
        """Opens the reservation to one writer; `holder` hears of its end. Raises what HandoffReceiver.reserve raises."""
        grant = self.receiver.reserve(
            Reservation(
                dispatch=_key(work.dispatch),
                blocks=reserved.blocks,
                generations=reserved.generations,
                cached_tokens=reserved.cached_tokens,
                token_count=len(work.token_ids) // TOKEN_BYTES,
            ),
            transport or self.endpoints[0].transport,
        )
        self._destination.hold(work.dispatch, holder)
        return grant

    def grant_pages(
        self, blocks: Sequence[int], generations: Sequence[int], holder: ReservationHolder
    ) -> worker_pb2.Grant:
        """Opens blocks for whole pages to one writer, over the best transport."""
        dispatch = Dispatch(next(self._pulls), PULL_ATTEMPT)
        tokens = len(blocks) * self._page_tokens
        reservation = Reservation(_key(dispatch), tuple(blocks), tuple(generations), 0, tokens)
        grant = self.receiver.reserve(reservation, self.endpoints[0].transport)
        self._destination.hold(dispatch, holder)
        return grant

    def revoke(self, dispatch: Dispatch, error: PdserveError) -> None:
        """Ends the writer of a reservation; its holder hears of it. Without effect where none is left."""
        self.receiver.revoke(_key(dispatch), error)

    def send(self, work: Work, grant: worker_pb2.Grant, decode_address: str) -> Handoff:
        """Begins the hand-off of `work` to the holder of `grant`."""
        order = HandoffOrder(_key(work.dispatch), grant, decode_address, len(work.token_ids) // TOKEN_BYTES)
        return self._sender.start(order)

    def send_pages(self, blocks: Sequence[int], grant: worker_pb2.Grant, address: str) -> Handoff:
        """Begins the hand-off of whole pages that lie in `blocks` already, to the holder of `grant`. They must keep their bytes until
        its outcome."""
        key = DispatchKey(grant.dispatch.request_key, grant.dispatch.attempt)
        handoff = self._sender.start(HandoffOrder(key, grant, address, len(blocks) * self._page_tokens))
        handoff.source_blocks(blocks)
        for layer in range(self.side.identity.layers):
            handoff.kv_ready(layer, 0, len(blocks))
        handoff.finish(())
        return handoff

    def channel(self, address: str) -> grpc.aio.Channel:
        """To another worker; not the caller's to close."""
        return self._sender.channel(address)

    @property
    def _page_tokens(self) -> int:
        return self.side.groups[0].page_tokens


class _EngineDestination:
    """kv_transfer's Destination: tells the engine first, then whoever holds the reservation."""

    def __init__(self, engine: EngineLink) -> None:
        self._engine = engine
        self._holders: dict[Dispatch, ReservationHolder] = {}

    def hold(self, dispatch: Dispatch, holder: ReservationHolder) -> None:
        self._holders[dispatch] = holder

    def activate(
        self, dispatch: DispatchKey, first_tokens: tuple[tuple[int, int], ...], report: ReceivedReport
    ) -> None:
        held = Dispatch(dispatch.request_key, dispatch.attempt)
        if held.attempt != PULL_ATTEMPT:
            self._engine.send(Activate(held, first_tokens))
        self._holders.pop(held).activated(first_tokens, report)

    def writer_done(self, dispatch: DispatchKey, error: PdserveError | None) -> None:
        held = Dispatch(dispatch.request_key, dispatch.attempt)
        if held.attempt != PULL_ATTEMPT:
            self._engine.send(WriterDone(held))
        self._holders.pop(held).writer_ended(error)


def _key(dispatch: Dispatch) -> DispatchKey:
    return DispatchKey(dispatch.request_key, dispatch.attempt)
