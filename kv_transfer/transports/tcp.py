"""Owns the tcp transport: framed messages over plain sockets, received straight into the posted buffers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

from kv_transfer.transport import Buffer, Connection
from kv_transfer.transports.doorway import Doorway, knock
from kv_transfer.transports.frames import (
    HEADER_BYTES,
    FrameHeader,
    pack_header,
    unpack_header,
)
from kv_transfer.transports.posted import PostedReceive, PostedReceives, check_buffer, check_target
from pdserve.errors import TransferFailed

_DISCARD_BYTES = 256 * 1024
# Reads per readiness event: one message after the other may not starve the loop.
_READS_PER_EVENT = 4


class TcpConnection:
    """One socket. The reader stops at a frame whose receive is not posted yet, for at most `post_s`."""

    def __init__(self, sock: socket.socket, post_s: float) -> None:
        self._sock = sock
        self._post_s = post_s
        self._loop = asyncio.get_running_loop()
        self._posted = PostedReceives()
        self._sending = asyncio.Lock()
        self._error: str | None = None
        self._header = memoryview(bytearray(HEADER_BYTES))
        self._header_filled = 0
        self._frame: FrameHeader | None = None
        self._received = 0  # bytes of the current frame's body
        self._current: PostedReceive | None = None
        self._discard: memoryview | None = None  # target of a body that nobody wants
        self._pause: asyncio.TimerHandle | None = None  # runs while the reader waits for a receive to be posted
        self._loop.add_reader(sock.fileno(), self._on_readable)

    @property
    def closed(self) -> bool:
        return self._error is not None

    async def send(self, tag: int, buffer: Buffer) -> None:
        """See `transport.Connection`. A cancelled send closes the connection: half a frame cannot be taken back."""
        check_buffer(buffer)
        async with self._sending:
            self._check_open()
            try:
                await self._send_frame(pack_header(tag, len(buffer)), buffer)
            except OSError as error:
                self._shut(f"send failed: {error}")
                raise TransferFailed(f"KV connection lost while sending: {self._error}.") from error
            except asyncio.CancelledError:
                self._shut("a send was cancelled")
                raise

    async def _send_frame(self, header: bytes, buffer: Buffer) -> None:
        try:
            sent = self._sock.sendmsg((header, buffer))
        except (BlockingIOError, InterruptedError):
            sent = 0
        if sent < HEADER_BYTES:
            await self._loop.sock_sendall(self._sock, header[sent:])
            sent = HEADER_BYTES
        if sent < HEADER_BYTES + len(buffer):
            await self._loop.sock_sendall(self._sock, buffer[sent - HEADER_BYTES :])

    async def recv(self, tag: int, buffer: Buffer) -> None:
        check_target(buffer)
        self._check_open()
        receive = self._posted.post(tag, buffer)
        if self._frame is not None and self._pause is not None and self._frame.tag == tag:
            self._resume()
        try:
            await receive.done
        finally:
            # After a cancel: the reader sees that nobody wants the rest and throws it away.
            self._posted.abandon(receive)

    async def close(self) -> None:
        self._shut("closed on this side")

    def _check_open(self) -> None:
        if self._error is not None:
            raise TransferFailed(f"KV connection is closed: {self._error}.")

    def _shut(self, reason: str) -> None:
        if self._error is not None:
            return
        self._error = reason
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock.fileno())
        with contextlib.suppress(OSError):  # ENOTCONN: the peer was faster
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes a send in progress
        # Closed a turn later: the loop still unregisters that send by the descriptor's number.
        self._loop.call_soon(self._close_when_sent)
        message = f"KV connection lost: {reason}."
        if self._current is not None:
            self._current.fail(message)
        self._posted.fail_all(message)

    def _close_when_sent(self) -> None:
        if self._sending.locked():
            self._loop.call_soon(self._close_when_sent)
        else:
            self._sock.close()

    # ---- reading

    def _on_readable(self) -> None:
        try:
            for _ in range(_READS_PER_EVENT):
                if self._error is not None or self._pause is not None or not self._read_some():
                    return
        except (BlockingIOError, InterruptedError):
            return
        except TransferFailed as error:
            self._shut(error.message)
        except OSError as error:
            self._shut(str(error))

    def _read_some(self) -> bool:
        """One read; False at the end of the stream."""
        if self._frame is None:
            return self._read_header()
        return self._read_body(self._frame)

    def _read_header(self) -> bool:
        count = self._sock.recv_into(self._header[self._header_filled :])
        if not count:
            self._shut("the peer closed it")
            return False
        self._header_filled += count
        if self._header_filled == HEADER_BYTES:
            self._header_filled = 0
            self._received = 0
            self._frame = unpack_header(self._header)
            self._match(self._frame)
        return True

    def _match(self, frame: FrameHeader) -> None:
        self._current = self._posted.take(frame.tag)
        if self._current is None:
            if self._posted.take_abandoned(frame.tag):
                self._discard = memoryview(bytearray(min(frame.length_bytes, _DISCARD_BYTES)))
            else:
                self._stall(frame.tag)
        elif len(self._current.buffer) != frame.length_bytes:
            self._current.fail(
                f"KV message {frame.tag} has {frame.length_bytes} bytes, expected were {len(self._current.buffer)}."
            )
            self._discard = memoryview(bytearray(min(frame.length_bytes, _DISCARD_BYTES)))

    def _read_body(self, frame: FrameHeader) -> bool:
        left = frame.length_bytes - self._received
        count = self._sock.recv_into(self._target(left))
        if not count:
            self._shut("the peer closed it inside a message")
            return False
        self._received += count
        if self._received == frame.length_bytes:
            if self._current is not None:
                self._current.complete()
            self._frame = self._current = self._discard = None
        return True

    def _target(self, left: int) -> memoryview:
        if self._discard is None:
            assert self._current is not None
            if self._current.wanted:
                return self._current.buffer[self._received :]
            self._discard = memoryview(bytearray(min(left, _DISCARD_BYTES)))
        return self._discard[:left]

    def _stall(self, tag: int) -> None:
        """Stops reading until the receive is posted: what the peer may send unasked stays in the kernel's buffers."""
        self._loop.remove_reader(self._sock.fileno())
        self._pause = self._loop.call_later(
            self._post_s, self._shut, f"message {tag} came, but no receive was posted for it in {self._post_s} s"
        )

    def _resume(self) -> None:
        assert self._frame is not None
        assert self._pause is not None
        self._pause.cancel()
        self._pause = None
        self._match(self._frame)
        self._loop.add_reader(self._sock.fileno(), self._on_readable)


class TcpTransport:
    """`post_s`: see TcpConnection; `hello_s`: deadline of a peer's hello."""

    def __init__(self, host: str, post_s: float, hello_s: float) -> None:
        self._post_s = post_s
        self._door = Doorway("tcp", host, hello_s)
        self._connections: set[TcpConnection] = set()

    @property
    def name(self) -> str:
        return "tcp"

    async def listen(self, on_connection: Callable[[Connection, bytes], Awaitable[None]]) -> str:
        async def on_guest(sock: socket.socket, hello: bytes) -> None:
            await on_connection(self._own(sock), hello)

        return await self._door.open(on_guest)

    async def connect(self, address: str, hello: bytes, deadline_s: float) -> Connection:
        try:
            async with asyncio.timeout(deadline_s):
                return self._own(await knock(address, hello))
        except (OSError, ValueError) as error:  # TimeoutError is an OSError
            raise TransferFailed(
                f"Cannot connect to the KV endpoint tcp {address}: {str(error) or 'timeout'}."
            ) from error

    def _own(self, sock: socket.socket) -> TcpConnection:
        self._connections = {connection for connection in self._connections if not connection.closed}
        connection = TcpConnection(sock, self._post_s)
        self._connections.add(connection)
        return connection

    async def close(self) -> None:
        await self._door.close()
        for connection in self._connections:
            await connection.close()
