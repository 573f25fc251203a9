"""Owns the receiving process of the transfer benchmark: one transport, no hand-off protocol, no checksums.

Arguments: the transport's name and profile. Says its address on stdout; each line on stdin is "first_tag messages size_bytes
in_flight": receives that many messages, several at once, and answers with the seconds from the first posted receive to the last byte.
"""

from __future__ import annotations

import asyncio
import sys
import time

import uvloop

from kv_transfer.arena import Arena, ArenaShape
from kv_transfer.transport import Connection
from kv_transfer.transports import open_transport
from service_kit.config import TransferConfig

HOST = "127.0.0.1"
ACCEPT_S = 60.0  # a peer that was refused at the door is not told of by it


async def receive(connection: Connection, arena: Arena, first_tag: int, messages: int, in_flight: int) -> float:
    """Seconds for `messages` messages, each a whole block of the arena."""
    tags = iter(range(messages))

    async def lane() -> None:
        for index in tags:
            await connection.recv(first_tag + index, arena.blocks(0, index, 1))

    start_s = time.perf_counter()
    await asyncio.gather(*(lane() for _ in range(in_flight)))
    return time.perf_counter() - start_s


async def main(name: str, profile: str) -> None:
    transport = open_transport(name, TransferConfig.model_validate({"profile": profile}), HOST)
    accepted: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()

    async def on_connection(connection: Connection, hello: bytes) -> None:
        accepted.set_result(connection)

    sys.stdout.write(f"{await transport.listen(on_connection)}\n")
    sys.stdout.flush()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    arena: Arena | None = None
    while line := await reader.readline():
        first_tag, messages, size_bytes, in_flight = map(int, line.split())
        if arena is None or arena.layout.block_bytes != size_bytes:
            arena = Arena.anonymous(ArenaShape(1, messages, size_bytes))
            arena.prefault()
        async with asyncio.timeout(ACCEPT_S):
            connection = await accepted
        seconds = await receive(connection, arena, first_tag, messages, in_flight)
        sys.stdout.write(f"{seconds}\n")
        sys.stdout.flush()
    await transport.close()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
