"""Owns the rig of hand-off tests: two arenas, a real gRPC server on loopback, a destination that writes down what it hears."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import numpy

from kv_transfer.arena import Arena, ArenaShape
from kv_transfer.keys import identity_digest
from kv_transfer.layout import KvIdentity, LayoutGroup
from kv_transfer.leases import DispatchKey
from kv_transfer.receiver import HandoffReceiver, ReceivedReport, Reservation
from kv_transfer.sender import Handoff, HandoffOrder, HandoffSender
from kv_transfer.side import KvSide
from kv_transfer.transport import Transport
from pdserve.errors import PdserveError
from pdserve.v1 import handoff_pb2_grpc, worker_pb2
from service_kit.config import TransferConfig

IDENTITY = KvIdentity(identity_digest([("model", "tiny")]), "tiny", "float32", layers=4, kv_heads=2, head_dim=8)
PAGE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Geometry:
    layers: int = 4
    blocks: int = 64
    block_bytes: int = 2048


def make_side(name: str, geometry: Geometry, incarnation: int = 1, identity: KvIdentity = IDENTITY) -> KvSide:
    group = LayoutGroup(
        page_tokens=PAGE_TOKENS, layer_count=geometry.layers, head_count=2, block_bytes=geometry.block_bytes
    )
    arena = Arena.anonymous(ArenaShape(geometry.layers, geometry.blocks, geometry.block_bytes))
    return KvSide(name, incarnation, identity, (group,), arena)


def fill(side: KvSide, seed: int = 0) -> None:
    """Random bytes in every block."""
    layout = side.arena.layout
    rng = numpy.random.default_rng(seed)
    for layer in range(layout.layers):
        data = side.arena.blocks(layer, 0, layout.blocks)
        data[:] = rng.bytes(len(data))


def block_bytes_of(side: KvSide, layer: int, block: int) -> bytes:
    return bytes(side.arena.blocks(layer, block, 1))


@dataclass
class Ending:
    dispatch: DispatchKey
    error: PdserveError | None
    first_tokens: tuple[tuple[int, int], ...] | None = None
    report: ReceivedReport | None = None


@dataclass
class RecordingDestination:
    """A Destination that keeps what it hears, in order."""

    endings: list[Ending] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def activate(
        self, dispatch: DispatchKey, first_tokens: tuple[tuple[int, int], ...], report: ReceivedReport
    ) -> None:
        self._add(Ending(dispatch, None, first_tokens, report))

    def writer_done(self, dispatch: DispatchKey, error: PdserveError | None) -> None:
        self._add(Ending(dispatch, error))

    def _add(self, ending: Ending) -> None:
        assert all(other.dispatch != ending.dispatch for other in self.endings), "told twice"
        self.endings.append(ending)
        self.news.set()

    async def ending(self, dispatch: DispatchKey, deadline_s: float = 30.0) -> Ending:
        async with asyncio.timeout(deadline_s):
            while True:
                for ending in self.endings:
                    if ending.dispatch == dispatch:
                        return ending
                self.news.clear()
                await self.news.wait()


@dataclass
class Rig:
    source: KvSide
    target: KvSide
    sender: HandoffSender
    receiver: HandoffReceiver
    destination: RecordingDestination
    address: str
    transport: str
    sending: Transport | None = None

    def reserve(self, blocks: tuple[int, ...], tokens: int, cached_tokens: int = 0, key: int = 1) -> worker_pb2.Grant:
        reservation = Reservation(DispatchKey(key, 1), blocks, (1,) * len(blocks), cached_tokens, tokens)
        return self.receiver.reserve(reservation, self.transport)

    def start(self, grant: worker_pb2.Grant, tokens: int) -> Handoff:
        key = DispatchKey(grant.dispatch.request_key, grant.dispatch.attempt)
        return self.sender.start(HandoffOrder(key, grant, self.address, tokens))


@asynccontextmanager
async def open_rig(
    sending: Transport,
    receiving: Transport,
    geometry: Geometry = Geometry(),
    config: TransferConfig = TransferConfig(),  # noqa: B008 (frozen)
) -> AsyncIterator[Rig]:
    source, target = make_side("p0", geometry), make_side("d0", geometry, incarnation=2)
    fill(source)
    destination = RecordingDestination()
    name = receiving.name
    receiver = HandoffReceiver(target, {name: receiving}, config, destination)
    await receiver.start()
    server = grpc.aio.server()
    handoff_pb2_grpc.add_HandoffServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sender = HandoffSender(source, {name: sending}, config)
    try:
        yield Rig(source, target, sender, receiver, destination, f"127.0.0.1:{port}", name)
    finally:
        await sender.close()
        await receiver.close()
        await server.stop(None)


async def eventually(condition: Callable[[], bool], deadline_s: float = 30.0) -> None:
    """Waits for a condition that no event announces."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "the condition did not come true in time"
        await asyncio.sleep(0.005)
