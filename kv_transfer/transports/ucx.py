"""Owns the ucx transport: a door on a plain socket, behind it a UCX context for every peer.

Who says a hello at the door gets the port of a UCX listener made for it alone, and the number of endpoints that are to come. It
connects them there, and each repeats the hello, since that listener binds all interfaces (the library takes no address). It closes
when all have come. The socket of the door stays open: its end says at once that the peer's process ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from kv_transfer.transport import Connection
from kv_transfer.transports.doorway import Doorway, knock, read_exactly
from kv_transfer.transports.frames import HELLO_BYTES
from kv_transfer.transports.pump import Pump
from kv_transfer.transports.ucx_connection import UcxConnection
from kv_transfer.transports.ucx_lane import Lane
from kv_transfer.transports.ucx_library import Endpoint, load_library
from kv_transfer.transports.ucx_profiles import STREAMS
from pdserve.errors import TransferFailed

_INVITATION = struct.Struct(">HB")  # port, endpoints
_MAX_STREAMS = 16


class UcxTransport:
    """`profile` of `ucx_profiles`; `hello_s`: deadline for a peer to come in. Raises ConfigInvalid without the library."""

    def __init__(self, host: str, profile: str, hello_s: float) -> None:
        self._library = load_library(profile)
        self._streams = STREAMS[profile]
        self._pump = Pump()
        self._door = Doorway("ucx", host, hello_s)
        self._connections: set[UcxConnection] = set()

    @property
    def name(self) -> str:
        return "ucx"

    async def listen(self, on_connection: Callable[[Connection, bytes], Awaitable[None]]) -> str:
        async def on_guest(sock: socket.socket, hello: bytes) -> None:
            await on_connection(await self._let_in(sock, hello), hello)

        return await self._door.open(on_guest)

    async def connect(self, address: str, hello: bytes, deadline_s: float) -> Connection:
        try:
            async with asyncio.timeout(deadline_s):
                sock = await knock(address, hello)
                async with self._lane(sock) as lane:
                    port, streams = _INVITATION.unpack(await read_exactly(sock, _INVITATION.size))
                    if not 0 < streams <= _MAX_STREAMS:
                        raise TransferFailed(f"The KV endpoint ucx {address} asks for {streams} streams.")
                    host = str(sock.getpeername()[0])
                    async with _abort_on_error() as endpoints:
                        for _ in range(streams):
                            endpoints.append(await lane.context.create_endpoint(host, port, True, deadline_s))
                            await endpoints[-1].send(hello)
                        return self._own(endpoints, lane, sock)
        except self._library.errors as error:
            raise TransferFailed(
                f"Cannot connect to the KV endpoint ucx {address}: {str(error) or 'timeout'}."
            ) from error

    async def _let_in(self, sock: socket.socket, hello: bytes) -> UcxConnection:
        try:
            async with self._lane(sock) as lane, _abort_on_error() as endpoints:
                await _meet(lane, sock, self._streams, endpoints)
                for endpoint in endpoints:
                    await _hear(endpoint, lane, hello)
                return self._own(endpoints, lane, sock)
        except self._library.errors as error:
            raise TransferFailed(f"The peer did not connect: {str(error) or 'timeout'}.") from error

    @contextlib.asynccontextmanager
    async def _lane(self, sock: socket.socket) -> AsyncIterator[Lane]:
        """A new lane, driven inside; it and `sock` go where connecting fails."""
        lane = Lane(self._library.open_context(), self._pump)
        try:
            with lane.meeting():
                yield lane
        except BaseException:
            lane.drop()
            sock.close()
            raise

    def _own(self, endpoints: Sequence[Endpoint], lane: Lane, sock: socket.socket) -> UcxConnection:
        self._connections = {connection for connection in self._connections if not connection.closed}
        connection = UcxConnection(endpoints, lane, sock, self._library.errors)
        self._connections.add(connection)
        return connection

    async def close(self) -> None:
        await self._door.close()
        for connection in self._connections:
            await connection.close()
        self._pump.stop()


async def _meet(lane: Lane, sock: socket.socket, streams: int, endpoints: list[Endpoint]) -> None:
    """Listens for the one peer behind `sock`, until `endpoints` are as many as `streams`."""

    async def on_endpoint(endpoint: Endpoint) -> None:
        if len(endpoints) == streams:  # somebody else found the port
            endpoint.abort()
        else:
            endpoints.append(endpoint)

    listener = lane.context.create_listener(on_endpoint, 0, True)
    try:
        await asyncio.get_running_loop().sock_sendall(sock, _INVITATION.pack(listener.port, streams))
        await lane.until(lambda: len(endpoints) == streams and not listener.active_clients)
    finally:
        listener.close()


async def _hear(endpoint: Endpoint, lane: Lane, hello: bytes) -> None:
    """Waits for the hello that the peer repeats. Raises TransferFailed where something else comes."""

    def came() -> bool:
        if endpoint.closed:
            raise TransferFailed("The peer left before its hello.")
        return endpoint.tag_probe().matched

    await lane.until(came)
    arrival = endpoint.tag_probe(remove=True)
    heard = bytearray(HELLO_BYTES)
    if arrival.length != len(heard):
        raise TransferFailed("The peer's first message is not its hello.")
    await endpoint.recv_with_handle(heard, arrival)
    if heard != hello:
        raise TransferFailed("Another peer came than the one that was let in.")


@contextlib.asynccontextmanager
async def _abort_on_error() -> AsyncIterator[list[Endpoint]]:
    """A list for endpoints that are aborted where coming together fails."""
    endpoints: list[Endpoint] = []
    try:
        yield endpoints
    except BaseException:
        for endpoint in endpoints:
            endpoint.abort()
        raise
