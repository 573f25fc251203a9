"""Owns the tcp transport: messages over plain sockets, several for each connection, so that several cores copy."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence

from kv_transfer.transport import Buffer, Connection
from kv_transfer.transports.doorway import Doorway
from kv_transfer.transports.mover import until_done
from kv_transfer.transports.posted import check_buffer, check_target
from kv_transfer.transports.tcp_inbox import Inbox
from kv_transfer.transports.tcp_joint import Joint, knock_together
from kv_transfer.transports.tcp_stream import TcpStream
from pdserve.errors import TransferFailed

# Sockets of a connection. More than one thread copies on either side then, and while the one waits for its socket, the other does not;
# more than two were not faster.
TCP_STREAMS = 2
_GRACE_S = 1.0  # for a message that nobody wants any more to come whole, before its connection is closed


class TcpConnection:
    """A message goes over any of the sockets: tags match in the whole connection. The end of one is the end of all."""

    def __init__(self, sockets: Sequence[socket.socket], post_s: float) -> None:
        self._inbox = Inbox(post_s)
        self._error: str | None = None
        self._streams = [TcpStream(sock, self._inbox, self._shut) for sock in sockets]

    @property
    def closed(self) -> bool:
        return self._error is not None

    async def send(self, tag: int, buffer: Buffer) -> None:
        """See `transport.Connection`. A cancelled send closes the connection: half a frame cannot be taken back."""
        check_buffer(buffer)
        self._check_open()
        try:
            await min(self._streams, key=_queued_bytes).send(tag, buffer)
        except OSError as error:
            self._shut(f"send failed: {error}")
            raise TransferFailed(f"KV connection lost while sending: {self._error}.") from error

    async def recv(self, tag: int, buffer: Buffer) -> None:
        check_target(buffer)
        self._check_open()
        receive = self._inbox.post(tag, buffer)
        try:
            await asyncio.shield(receive.done)
        except asyncio.CancelledError:
            if not self._inbox.abandon(receive):
                await self._quiesce(receive.done)
            raise

    async def _quiesce(self, filled: asyncio.Future[None]) -> None:
        """The caller gave up inside the message: it may come whole, else the connection is closed, which ends it."""
        try:
            await asyncio.wait((filled,), timeout=_GRACE_S)
        finally:
            if not filled.done():
                self._shut("a receive was given up inside its message")
            await until_done(filled)

    async def close(self) -> None:
        self._shut("closed on this side")

    def _check_open(self) -> None:
        if self._error is not None:
            raise TransferFailed(f"KV connection is closed: {self._error}.")

    def _shut(self, reason: str) -> None:
        if self._error is not None:
            return
        self._error = reason
        self._inbox.close(f"KV connection lost: {reason}.")
        for stream in self._streams:
            stream.shut()


def _queued_bytes(stream: TcpStream) -> int:
    return stream.queued_bytes


class TcpTransport:
    """`post_s`: see Inbox; `hello_s`: deadline of a peer's hello; `streams`: sockets of a connection that is made here."""

    def __init__(self, host: str, post_s: float, hello_s: float, streams: int) -> None:
        self._post_s = post_s
        self._streams = streams
        self._door = Doorway("tcp", host, hello_s)
        self._joint = Joint()
        self._connections: set[TcpConnection] = set()

    @property
    def name(self) -> str:
        return "tcp"

    async def listen(self, on_connection: Callable[[Connection, bytes], Awaitable[None]]) -> str:
        async def on_guests(sockets: Sequence[socket.socket], hello: bytes) -> None:
            connection = self._own(sockets)
            try:
                await on_connection(connection, hello)
            except BaseException:
                await connection.close()
                raise

        async def on_guest(sock: socket.socket, hello: bytes) -> None:
            await self._joint.add(sock, hello, on_guests)

        return await self._door.open(on_guest)

    async def connect(self, address: str, hello: bytes, deadline_s: float) -> Connection:
        try:
            async with asyncio.timeout(deadline_s):
                return self._own(await knock_together(address, hello, self._streams))
        except (OSError, ValueError) as error:  # TimeoutError is an OSError
            raise TransferFailed(
                f"Cannot connect to the KV endpoint tcp {address}: {str(error) or 'timeout'}."
            ) from error

    def _own(self, sockets: Sequence[socket.socket]) -> TcpConnection:
        self._connections = {connection for connection in self._connections if not connection.closed}
        connection = TcpConnection(sockets, self._post_s)
        self._connections.add(connection)
        return connection

    async def close(self) -> None:
        await self._door.close()
        for connection in self._connections:
            await connection.close()
