"""Owns the ucx transport: a door on a plain socket, behind it a UCX context for every peer.

Who says a hello at the door gets the port of a UCX listener made for it alone, connects there, and repeats the hello, since
that listener binds all interfaces (the library takes no address). It closes when its peer has come. The socket of the door
stays open: its end says at once that the peer's process ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

from kv_transfer.transport import Connection
from kv_transfer.transports.doorway import Doorway, knock, read_exactly
from kv_transfer.transports.frames import HELLO_BYTES
from kv_transfer.transports.pump import Pump
from kv_transfer.transports.ucx_connection import UcxConnection
from kv_transfer.transports.ucx_lane import Lane
from kv_transfer.transports.ucx_library import Endpoint, load_library
from pdserve.errors import TransferFailed

_PORT = struct.Struct(">H")


class UcxTransport:
    """`profile` of `ucx_profiles`; `hello_s`: deadline for a peer to come in. Raises ConfigInvalid without the library."""

    def __init__(self, host: str, profile: str, hello_s: float) -> None:
        self._library = load_library(profile)
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
                    (port,) = _PORT.unpack(await read_exactly(sock, _PORT.size))
                    host = str(sock.getpeername()[0])
                    endpoint = await lane.context.create_endpoint(host, port, True, deadline_s)
                    async with _abort_on_error(endpoint):
                        await endpoint.send(hello)
                        return self._own(endpoint, lane, sock)
        except self._library.errors as error:
            raise TransferFailed(
                f"Cannot connect to the KV endpoint ucx {address}: {str(error) or 'timeout'}."
            ) from error

    async def _let_in(self, sock: socket.socket, hello: bytes) -> UcxConnection:
        try:
            async with self._lane(sock) as lane:
                endpoint = await _meet(lane, sock)
                async with _abort_on_error(endpoint):
                    await _hear(endpoint, lane, hello)
                    return self._own(endpoint, lane, sock)
        except self._library.errors as error:
            raise TransferFailed(f"The peer did not connect: {str(error) or 'timeout'}.") from error

    @contextlib.asynccontextmanager
    async def _lane(self, sock: socket.socket) -> AsyncIterator[Lane]:
        """A new lane, driven inside; it and `sock` go where connecting fails."""
        lane = Lane(self._library.open_context(), self._pump)
        try:
            with lane.active():
                yield lane
        except BaseException:
            lane.drop()
            sock.close()
            raise

    def _own(self, endpoint: Endpoint, lane: Lane, sock: socket.socket) -> UcxConnection:
        self._connections = {connection for connection in self._connections if not connection.closed}
        connection = UcxConnection(endpoint, lane, sock, self._library.errors)
        self._connections.add(connection)
        return connection

    async def close(self) -> None:
        await self._door.close()
        for connection in self._connections:
            await connection.close()
        self._pump.stop()


async def _meet(lane: Lane, sock: socket.socket) -> Endpoint:
    """Listens for the one peer behind `sock`."""
    loop = asyncio.get_running_loop()
    met: asyncio.Future[Endpoint] = loop.create_future()

    async def on_endpoint(endpoint: Endpoint) -> None:
        if met.done():  # somebody else found the port
            endpoint.abort()
        else:
            met.set_result(endpoint)

    listener = lane.context.create_listener(on_endpoint, 0, True)
    try:
        await loop.sock_sendall(sock, _PORT.pack(listener.port))
        endpoint = await met
        async with _abort_on_error(endpoint):
            await lane.until(lambda: not listener.active_clients)
        return endpoint
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
async def _abort_on_error(endpoint: Endpoint) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        endpoint.abort()
        raise
