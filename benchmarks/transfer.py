"""KV bytes between two processes of one host: 256 MB as 64 messages of 4 MB, per transport, against memcpy in the same run.

`python -m benchmarks.transfer [--full] [-o json]`. "bare" is Connection.send and recv alone; "hand-off" the whole of it: control
session, checksums on both sides, commit; GB/s there are from its start to its end as the sender sees them.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Literal

import uvloop

from benchmarks.command import benchmark_parser, mode_of, publish
from benchmarks.handoff_destination import Setup
from benchmarks.handoff_source import HandoffSource, handoff_source
from benchmarks.report import Measurement, Mode, Result, compare, measure, result
from kv_transfer.arena import Arena, ArenaShape
from kv_transfer.transport import Connection
from kv_transfer.transports import open_transport
from service_kit.config import TransferConfig

TRANSPORTS = ("ucx", "tcp")
Profile = Literal["host", "tcp"]
HOST = "127.0.0.1"
MESSAGES = 64
MESSAGE_BYTES = 4 * 2**20
TOTAL_BYTES = MESSAGES * MESSAGE_BYTES
IN_FLIGHT = 16
SMALL_MESSAGES = 64
SMALL_BYTES = 16 * 1024
LAYERS = 16
BLOCK_BYTES = 64 * 1024
PAGE_TOKENS = 16
DEADLINE_S = 60.0


def memcpy_gb_s(target: memoryview, source: memoryview) -> float:
    start_s = time.perf_counter()
    for offset in range(0, len(source), MESSAGE_BYTES):
        target[offset : offset + MESSAGE_BYTES] = source[offset : offset + MESSAGE_BYTES]
    return len(source) / (time.perf_counter() - start_s) / 1e9


# ---- bare


class Sink:
    """The receiving process and the connection to it."""

    def __init__(self, process: asyncio.subprocess.Process, connection: Connection) -> None:
        self._process = process
        self._connection = connection
        self._tags: Iterator[int] = iter(range(secrets.randbits(60), 2**62, 10_000))

    @property
    def pid(self) -> int:
        """Of the receiving process."""
        return self._process.pid

    async def push(self, data: memoryview, messages: int, size_bytes: int) -> float:
        """Sends `messages` messages of `data`; the seconds that the receiver measured."""
        first_tag = next(self._tags)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{first_tag} {messages} {size_bytes} {IN_FLIGHT}\n".encode())
        indices = iter(range(messages))

        async def lane() -> None:
            for index in indices:
                piece = data[index * size_bytes : (index + 1) * size_bytes]
                await self._connection.send(first_tag + index, piece)

        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*(lane() for _ in range(IN_FLIGHT)))
            return float(await line_of(self._process))


@asynccontextmanager
async def open_sink(name: str, profile: Profile = "host") -> AsyncIterator[Sink]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.transfer_sink", name, profile, stdin=pipe, stdout=pipe
    )
    transport = open_transport(name, TransferConfig(profile=profile), HOST)
    try:
        connection = await transport.connect(await line_of(process), secrets.token_bytes(16), 10.0)
        yield Sink(process, connection)
    finally:
        await transport.close()
        assert process.stdin is not None
        process.stdin.close()
        async with asyncio.timeout(DEADLINE_S):
            await process.wait()


async def line_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        return (await process.stdout.readline()).decode().strip()


async def bare_part(name: str, source: memoryview, copy: memoryview, rounds: int) -> list[Measurement]:
    rates: list[float] = []
    copies: list[float] = []
    small_us: list[float] = []
    async with open_sink(name) as sink:
        await sink.push(source, MESSAGES, MESSAGE_BYTES)
        for _ in range(rounds):
            rates.append(TOTAL_BYTES / await sink.push(source, MESSAGES, MESSAGE_BYTES) / 1e9)
            copies.append(memcpy_gb_s(copy, source))
        await sink.push(source, SMALL_MESSAGES, SMALL_BYTES)
        for _ in range(rounds):
            small_us.append(await sink.push(source, SMALL_MESSAGES, SMALL_BYTES) / SMALL_MESSAGES * 1e6)
    return [
        compare(f"{name}: bare, 64 x 4 MB", "GB/s", rates, ("memcpy", copies), "higher"),
        measure(f"{name}: bare, per message of 16 KB", "us", small_us),
    ]


# ---- hand-off


async def hand_off(source: HandoffSource, setup: Setup, name: str) -> float:
    """Seconds of one hand-off of 256 MB, everything ready at once."""
    blocks = setup.blocks // 2
    start_s = time.perf_counter()
    handoff = await source.begin(blocks * PAGE_TOKENS, name)
    handoff.source_blocks(range(blocks))
    for layer in range(LAYERS):
        handoff.kv_ready(layer, 0, blocks)
    handoff.finish([(0, 1)])
    outcome = await handoff.outcome()
    seconds = time.perf_counter() - start_s
    await source.ended()
    if outcome.error is not None:
        raise outcome.error
    assert outcome.bytes == TOTAL_BYTES
    return seconds


async def handoff_part(name: str, source: memoryview, copy: memoryview, rounds: int) -> Measurement:
    blocks = 2 * TOTAL_BYTES // LAYERS // BLOCK_BYTES
    setup = Setup(LAYERS, blocks, PAGE_TOKENS, 8, 64, "float32", BLOCK_BYTES, "00" * 32, "none", (name,))
    arena = Arena.anonymous(ArenaShape(LAYERS, blocks, BLOCK_BYTES))
    arena.prefault()
    rates: list[float] = []
    copies: list[float] = []
    async with handoff_source(setup, arena) as destination:
        await hand_off(destination, setup, name)
        for _ in range(rounds):
            rates.append(TOTAL_BYTES / await hand_off(destination, setup, name) / 1e9)
            copies.append(memcpy_gb_s(copy, source))
    return compare(f"{name}: hand-off of 256 MB", "GB/s", rates, ("memcpy", copies), "higher")


async def run(mode: Mode) -> Result:
    rounds = 5 if mode == "quick" else 15
    buffers = Arena.anonymous(ArenaShape(2, MESSAGES, MESSAGE_BYTES))
    buffers.prefault()
    source, copy = buffers.blocks(0, 0, MESSAGES), buffers.blocks(1, 0, MESSAGES)
    memcpy_gb_s(copy, source)
    measurements: list[Measurement] = []
    for name in TRANSPORTS:
        measurements += await bare_part(name, source, copy, rounds)
        measurements.append(await handoff_part(name, source, copy, rounds))
    settings: dict[str, str | int | float | bool] = {"in_flight": IN_FLIGHT, "profile": "host", "loop": "uvloop"}
    notes = ["memcpy alternates with the transfers, in the sending process; ratio above 1 = faster than memcpy"]
    return result("transfer", mode, settings, measurements, notes=notes)


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("KV bytes between two processes, against memcpy.")
    given = parser.parse_args(arguments)
    publish(uvloop.run(run(mode_of(given))))


if __name__ == "__main__":
    main()
