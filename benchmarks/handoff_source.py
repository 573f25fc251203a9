"""Owns the prefill worker's side of the hand-off benchmark: a HandoffSender, and the destination process that it talks to."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec

from benchmarks.handoff_destination import HOST, Ask, Ended, Endpoint, Granted, Setup
from kv_transfer.arena import Arena
from kv_transfer.handoff import Handoff, HandoffOrder
from kv_transfer.leases import DispatchKey
from kv_transfer.sender import HandoffSender
from kv_transfer.transports import open_transport
from pdserve.v1 import worker_pb2
from service_kit.config import TransferConfig

DEADLINE_S = 30.0
M = TypeVar("M", Endpoint, Granted, Ended)
_MESSAGES: msgspec.json.Decoder[Endpoint | Granted | Ended] = msgspec.json.Decoder(Endpoint | Granted | Ended)


class HandoffSource:
    """`begin` one hand-off after the other."""

    def __init__(self, process: asyncio.subprocess.Process, sender: HandoffSender, grpc_address: str) -> None:
        self._process = process
        self._sender = sender
        self._grpc_address = grpc_address
        self._next_key = 0

    async def begin(self, token_count: int, transport: str) -> Handoff:
        """Reserves at the destination and starts the hand-off; the caller says what is ready."""
        assert self._process.stdin is not None
        self._next_key += 1
        ask = Ask(self._next_key, token_count, transport)
        self._process.stdin.write(msgspec.json.encode(ask) + b"\n")
        granted = await read(self._process, Granted)
        grant = worker_pb2.Grant.FromString(bytes.fromhex(granted.grant_hex))
        return self._sender.start(HandoffOrder(DispatchKey(ask.key, 1), grant, self._grpc_address, token_count))

    async def ended(self) -> None:
        """Waits for the destination's word on the hand-off begun last. Raises RuntimeError if it failed."""
        ended = await read(self._process, Ended)
        if ended.error:
            raise RuntimeError(f"the hand-off failed at the destination: {ended.error}")


@asynccontextmanager
async def handoff_source(setup: Setup, arena: Arena) -> AsyncIterator[HandoffSource]:
    """Starts the destination process and ends it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.handoff_destination", msgspec.json.encode(setup).decode()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    config = TransferConfig()
    transports = {name: open_transport(name, config, HOST) for name in setup.transports}
    sender = HandoffSender(setup.side("source", arena), transports, config)
    try:
        endpoint = await read(process, Endpoint)
        yield HandoffSource(process, sender, endpoint.grpc_address)
    finally:
        await sender.close()
        for transport in transports.values():
            await transport.close()
        await end(process)


async def read(process: asyncio.subprocess.Process, kind: type[M]) -> M:
    """The next message of the destination, which must be a `kind`."""
    assert process.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        line = await process.stdout.readline()
    if not line:
        raise RuntimeError("the destination process ended; its output says why")
    message = _MESSAGES.decode(line)
    if not isinstance(message, kind):
        raise RuntimeError(f"the destination said {message}, expected was a {kind.__name__}")
    return message


async def end(process: asyncio.subprocess.Process) -> None:
    """Closes the destination's stdin, which ends it; kills it past the deadline."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(DEADLINE_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
