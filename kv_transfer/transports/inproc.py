"""Owns the inproc transport: connections inside one process, with a seeded fault plan. For tests, never a product path."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from kv_transfer.transport import Buffer, Connection
from kv_transfer.transports.frames import HELLO_BYTES
from kv_transfer.transports.posted import PostedReceives, check_buffer, check_target
from pdserve.errors import TransferFailed

_OnConnection = Callable[[Connection, bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Chance (0 to 1) of each fault per message, drawn from `seed`; delays are uniform in [0, delay_s]."""

    seed: int = 0
    delay_s: float = 0.0
    drop_connection: float = 0.0
    truncate: float = 0.0
    corrupt: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0


class _Pipe:
    """One direction: what is sent waits for its receive, so nothing is buffered but what a sender holds."""

    def __init__(self) -> None:
        self.posted = PostedReceives()
        self.arrived: dict[int, bytes] = {}
        self.taken: dict[int, asyncio.Future[None]] = {}


class InprocConnection:
    """One end of a pair. Faults are those of its own sends."""

    def __init__(self, outgoing: _Pipe, incoming: _Pipe, faults: FaultPlan, rng: random.Random) -> None:
        self._out = outgoing
        self._in = incoming
        self._faults = faults
        self._rng = rng
        self._closed = False
        self.peer: InprocConnection | None = None

    @property
    def closed(self) -> bool:
        return self._closed

    async def send(self, tag: int, buffer: Buffer) -> None:
        check_buffer(buffer)
        self._check_open()
        faults, rng = self._faults, self._rng
        data = _damage(bytes(buffer), faults, rng)
        if faults.delay_s or rng.random() < faults.reorder:
            await asyncio.sleep(rng.random() * (faults.delay_s or 0.01))
            self._check_open()
        if rng.random() < faults.drop_connection:
            await self.close()
            raise TransferFailed("KV connection lost: dropped by the fault plan.")
        await self._deliver(tag, data)
        if rng.random() < faults.duplicate and not self._closed:
            # The second copy finds no receive under its tag and is lost, as on a real wire.
            self._offer(tag, data)

    async def _deliver(self, tag: int, data: bytes) -> None:
        if self._offer(tag, data):
            return
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._out.arrived[tag] = data
        self._out.taken[tag] = taken
        try:
            await taken
        finally:
            self._out.arrived.pop(tag, None)
            self._out.taken.pop(tag, None)

    def _offer(self, tag: int, data: bytes) -> bool:
        """True where the message is dealt with: received, or thrown away."""
        receive = self._out.posted.take(tag)
        if receive is None:
            return self._out.posted.take_abandoned(tag)
        if not receive.wanted:
            return True
        if len(receive.buffer) != len(data):
            receive.fail(f"KV message {tag} has {len(data)} bytes, expected were {len(receive.buffer)}.")
        else:
            receive.buffer[:] = data
            receive.complete()
        return True

    async def recv(self, tag: int, buffer: Buffer) -> None:
        check_target(buffer)
        self._check_open()
        receive = self._in.posted.post(tag, buffer)
        data = self._in.arrived.get(tag)
        if data is not None and self.peer is not None:
            self.peer._offer(tag, data)
            taken = self._in.taken[tag]
            if not taken.done():
                taken.set_result(None)
        try:
            await receive.done
        finally:
            self._in.posted.abandon(receive)

    def _check_open(self) -> None:
        if self._closed:
            raise TransferFailed("KV connection is closed.")

    async def close(self) -> None:
        self._end("closed on this side")
        if self.peer is not None:
            self.peer._end("the peer closed it")

    def _end(self, reason: str) -> None:
        if self._closed:
            return
        self._closed = True
        message = f"KV connection lost: {reason}."
        self._in.posted.fail_all(message)
        for taken in self._out.taken.values():
            if not taken.done():
                taken.set_exception(TransferFailed(message))


def _damage(data: bytes, faults: FaultPlan, rng: random.Random) -> bytes:
    if rng.random() < faults.corrupt:
        at = rng.randrange(len(data))
        data = data[:at] + bytes((data[at] ^ (1 << rng.randrange(8)),)) + data[at + 1 :]
    if rng.random() < faults.truncate:
        data = data[: rng.randrange(len(data))]
    return data


_listeners: dict[str, _OnConnection] = {}
_ports = itertools.count(1)


class InprocTransport:
    """Addresses are "inproc:N", known in this process only. `faults` apply to what connections made here send."""

    def __init__(self, faults: FaultPlan | None = None) -> None:
        self._faults = faults or FaultPlan()
        self._rng = random.Random(self._faults.seed)
        self._address: str | None = None
        self._connections: list[InprocConnection] = []

    @property
    def name(self) -> str:
        return "inproc"

    async def listen(self, on_connection: _OnConnection) -> str:
        self._address = f"inproc:{next(_ports)}"
        _listeners[self._address] = on_connection
        return self._address

    async def connect(self, address: str, hello: bytes, deadline_s: float) -> Connection:
        on_connection = _listeners.get(address)
        if on_connection is None:
            raise TransferFailed(f"Cannot connect to the KV endpoint inproc {address}: nothing listens there.")
        if len(hello) != HELLO_BYTES:
            raise ValueError(f"a hello has {HELLO_BYTES} bytes, not {len(hello)}")
        up, down = _Pipe(), _Pipe()
        here = InprocConnection(up, down, self._faults, self._rng)
        there = InprocConnection(down, up, FaultPlan(), self._rng)
        here.peer, there.peer = there, here
        self._connections.append(here)
        async with asyncio.timeout(deadline_s):
            await on_connection(there, hello)
        return here

    async def close(self) -> None:
        if self._address is not None:
            _listeners.pop(self._address, None)
        for connection in self._connections:
            await connection.close()
