"""Owns two workers without engines for tests of pulls: real tables, endpoints and gRPC in one event loop, over a faulty transport."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np

from engine.block_tables import BlockTables
from engine.page_loads import PageLoads
from engine.page_protocol import LoadPages, PagesLoaded
from engine.pool import BlockPool
from engine.protocol import Command, EngineReady, Event, KvSource, KvStored, Layout
from kv_store.page import Page, PageFormat
from kv_store.tiered_store import TieredStore
from kv_transfer.arena import Arena
from kv_transfer.keys import chain_hashes, fingerprint_seed
from kv_transfer.peers import open_insecure_channel
from kv_transfer.transports.inproc import FaultPlan, InprocTransport
from pdserve.v1 import handoff_pb2_grpc, kv_pull_pb2_grpc
from service_kit.api_keys import ApiKeys
from service_kit.config import TransferConfig
from service_kit.grpc_server import GrpcServer, build_server
from tests.kv_store.test_tiered_store import Shelf, host_tier
from worker_runtime.kv_endpoint import KvEndpoint, kv_side
from worker_runtime.page_loans import PageLoans
from worker_runtime.page_openings import PageOpenings
from worker_runtime.page_pulls import OpenPages, PagePulls
from worker_runtime.stretches import Stretch, StretchCutter
from worker_runtime.tier_reads import TierReads, arena_pages

IDENTITY = bytes(range(32))
LAYERS, BLOCKS, BLOCK_BYTES, PAGE_TOKENS = 3, 48, 1024, 16
PAGES = 10
TOKENS = array("i", range(100, 100 + PAGE_TOKENS * PAGES))
FORMAT = PageFormat(IDENTITY, PAGE_TOKENS, LAYERS, BLOCK_BYTES)
# Who says nothing for seconds has had no turn on a busy machine, unless a test means it to.
CONFIG = TransferConfig(heartbeat_s=0.2, heartbeat_misses=100, lease_s=30.0, connect_s=30.0, max_message_bytes=4096)
DEADLINE_S = 20.0


def content(number: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(number).integers(0, 256, (LAYERS, BLOCK_BYTES), dtype=np.uint8)


class EngineTwin:
    """The tables of an engine behind EngineLink. While `paused` it answers nothing."""

    def __init__(self, identity: bytes) -> None:
        layout = Layout(LAYERS, BLOCKS, PAGE_TOKENS, 1, 8, "float32", BLOCK_BYTES)
        self.ready = EngineReady("m", identity, layout, 1000, (2,), 1, 0.0)
        self.arena = Arena.anonymous(layout)
        self.openings = PageOpenings(self)
        self.keys: set[bytes] = set()
        self.paused: list[Command] | None = None
        self._tables = BlockTables(BlockPool(BLOCKS), PAGE_TOKENS)
        self._loads = PageLoads(self._tables, fingerprint_seed(identity))

    def send(self, command: Command) -> None:
        if self.paused is not None:
            self.paused.append(command)
            return
        match command:
            case LoadPages():
                opened = self._loads.open(command, 0)
                assert opened is not None
                asyncio.get_running_loop().call_soon(self.openings.opened, opened)
            case PagesLoaded():
                self._loads.end(command, lambda blocks: None)
            case _:
                raise AssertionError(f"{command} is not for this twin")
        for news in self._tables.take_news():
            if isinstance(news, KvStored):
                self.keys |= {news.block_hashes[at : at + 32] for at in range(0, len(news.block_hashes), 32)}
        assert not self._tables.leaked(self._loads.tables())

    def resume(self) -> None:
        commands, self.paused = self.paused or [], None
        for command in commands:
            self.send(command)

    @property
    def blocks_held(self) -> int:
        return self._tables.pool.held

    async def events(self) -> AsyncIterator[Event]:
        return
        yield

    async def close(self) -> None: ...


@dataclass
class Peer:
    engine: EngineTwin
    kv: KvEndpoint
    store: TieredStore
    shelf: Shelf
    loans: PageLoans
    pulls: PagePulls
    address: str
    cutter: StretchCutter

    def stretch(self, pages: int = PAGES) -> Stretch:
        return self.cutter.cut(TOKENS.tobytes(), chain_hashes(IDENTITY, TOKENS.tobytes()), b"", pages)

    async def compute(self, pages: int = PAGES) -> None:
        """As if the engine had computed the first pages."""
        opened = await self.engine.openings.open(self.stretch(pages).to_load, time.monotonic() + DEADLINE_S)
        assert opened is not None
        arena = arena_pages(self.engine)
        for number, block in enumerate(opened.blocks, opened.first_page):
            arena[:, block] = content(number)
        self.engine.openings.end(opened.load_id, len(opened.blocks))

    def shelve(self, pages: int = PAGES) -> None:
        """Puts the first pages into a tier."""
        stored = [Page(each) for each in self.stretch(pages).ids]
        self.shelf.write(stored, [content(number) for number in range(pages)])

    async def pull(self, lender: Peer, pages: int = PAGES, deadline_s: float = DEADLINE_S) -> int:
        """Good pages; their bytes are right, and nobody writes to any block."""
        until_s = time.monotonic() + deadline_s
        opened = await self.engine.openings.open(self.stretch(pages).to_load, until_s)
        assert opened is not None
        into = OpenPages(opened.first_page, opened.blocks, opened.generations)
        good = await self.pulls.pull(lender.source(), self.stretch(pages), into, until_s)
        arena = arena_pages(self.engine)
        for number, block in enumerate(opened.blocks[:good], opened.first_page):
            assert (arena[:, block] == content(number)).all()
        self.engine.openings.end(opened.load_id, good)
        return good

    def source(self) -> KvSource:
        return KvSource("w0", self.address, PAGES * PAGE_TOKENS)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not holds():  # noqa: ASYNC110 (conditions have no event)
                await asyncio.sleep(0.002)

    async def idle(self) -> None:
        """Nothing is lent, no writer is left and no block is held."""
        await self.until(lambda: not self.engine.blocks_held and not self.kv.receiver.held)


async def _open_peer(name: str, transport: InprocTransport, identity: bytes, config: TransferConfig) -> Peer:
    engine, shelf = EngineTwin(identity), Shelf()
    side = kv_side(engine.ready, name, 1 + int(name[1:]), engine)
    kv = KvEndpoint(side, {"inproc": transport}, config, engine, open_insecure_channel)
    await kv.start()
    store = TieredStore(host_tier(8), [shelf], FORMAT.size_bytes)
    cutter = StretchCutter(engine.ready)
    reads = TierReads(store, arena_pages(engine), 1, "kv-lend")
    loans = PageLoans(kv, engine.openings, reads, cutter, engine.keys.__contains__)
    peer = Peer(engine, kv, store, shelf, loans, PagePulls(kv, lambda: peer.address), "", cutter)
    return peer


async def _serve(peer: Peer) -> GrpcServer:
    server = build_server((), ApiKeys())
    handoff_pb2_grpc.add_HandoffServiceServicer_to_server(peer.kv.receiver, server.server)
    kv_pull_pb2_grpc.add_KvPullServiceServicer_to_server(peer.loans, server.server)
    peer.address = server.bind("127.0.0.1", 0, None)
    await server.start()
    return server


@asynccontextmanager
async def open_peers(
    faults: FaultPlan | None = None,
    *,
    config: TransferConfig = CONFIG,
    identity: bytes = IDENTITY,
) -> AsyncIterator[tuple[Peer, Peer]]:
    """(lender, puller). faults: of what the lender sends. identity: the puller's."""
    peers = (
        await _open_peer("w0", InprocTransport(faults), IDENTITY, config),
        await _open_peer("w1", InprocTransport(), identity, config),
    )
    servers = [await _serve(peer) for peer in peers]
    try:
        yield peers
    finally:
        for peer, server in zip(peers, servers, strict=True):
            await server.stop(0.0)
            await peer.loans.close()
            await peer.kv.close()
            peer.store.close()
