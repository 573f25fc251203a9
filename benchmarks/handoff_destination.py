"""Owns the decode worker's side of the hand-off benchmark, a process of its own: HandoffReceiver over an arena without an engine.

Speaks lines of JSON: the first on stdout is an Endpoint; each Ask on stdin is answered by a Granted; a hand-off that has ended by an
Ended. End of stdin ends the process.
"""

from __future__ import annotations

import asyncio
import sys
from itertools import cycle

import grpc
import msgspec
import uvloop

from kv_transfer.arena import Arena, ArenaShape
from kv_transfer.layout import KvIdentity, LayoutGroup
from kv_transfer.leases import DispatchKey
from kv_transfer.receiver import HandoffReceiver, ReceivedReport, Reservation
from kv_transfer.side import KvSide
from kv_transfer.transports import open_transport
from pdserve.errors import PdserveError
from pdserve.v1 import handoff_pb2_grpc
from service_kit.config import TransferConfig

HOST = "127.0.0.1"
TRANSPORTS = ("ucx", "tcp")


class Setup(msgspec.Struct, frozen=True):
    """Geometry that both sides share; the only command-line argument, as JSON."""

    layers: int
    blocks: int
    page_tokens: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_bytes: int
    identity_hex: str
    model: str
    transports: tuple[str, ...] = TRANSPORTS

    def side(self, worker_id: str, arena: Arena) -> KvSide:
        digest = bytes.fromhex(self.identity_hex)
        identity = KvIdentity(digest, self.model, self.dtype, self.layers, self.kv_heads, self.head_dim)
        group = LayoutGroup(self.page_tokens, self.layers, self.kv_heads, self.block_bytes)
        return KvSide(worker_id, 1, identity, (group,), arena)


class Endpoint(msgspec.Struct, frozen=True, tag="endpoint"):
    grpc_address: str


class Ask(msgspec.Struct, frozen=True):
    key: int
    token_count: int
    transport: str


class Granted(msgspec.Struct, frozen=True, tag="granted"):
    key: int
    grant_hex: str


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    key: int
    error: str  # empty = activated
    transfer_us: int


def say(message: Endpoint | Granted | Ended) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


class Told:
    """A kv_transfer.receiver.Destination that says what it is told."""

    def activate(
        self, dispatch: DispatchKey, first_tokens: tuple[tuple[int, int], ...], report: ReceivedReport
    ) -> None:
        say(Ended(dispatch.request_key, "", report.transfer_us))

    def writer_done(self, dispatch: DispatchKey, error: PdserveError | None) -> None:
        say(Ended(dispatch.request_key, str(error or "given back"), 0))


async def serve(setup: Setup) -> None:
    arena = Arena.anonymous(ArenaShape(setup.layers, setup.blocks, setup.block_bytes))
    arena.prefault()
    config = TransferConfig()
    transports = {name: open_transport(name, config, HOST) for name in setup.transports}
    receiver = HandoffReceiver(setup.side("destination", arena), transports, config, Told())
    await receiver.start()
    server = grpc.aio.server()
    handoff_pb2_grpc.add_HandoffServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    say(Endpoint(f"{HOST}:{port}"))
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    halves = cycle((0, setup.blocks // 2))  # the next hand-off begins before the last one is forgotten
    generation = 0
    while line := await reader.readline():
        ask = msgspec.json.decode(line, type=Ask)
        count, first = -(-ask.token_count // setup.page_tokens), next(halves)
        generation += 1
        blocks = tuple(range(first, first + count))
        reservation = Reservation(DispatchKey(ask.key, 1), blocks, (generation,) * count, 0, ask.token_count)
        say(Granted(ask.key, receiver.reserve(reservation, ask.transport).SerializeToString().hex()))
    await receiver.close()
    await server.stop(None)
    for transport in transports.values():
        await transport.close()


if __name__ == "__main__":
    uvloop.run(serve(msgspec.json.decode(sys.argv[1], type=Setup)))
