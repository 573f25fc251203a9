"""Owns one socket of a tcp connection: a thread sends its frames, another one receives them straight into the posted buffers.

While they copy, the loop and the threads of the other sockets go on. Short messages are sent at once where the socket takes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import select
import socket
import threading
from collections.abc import Callable

from kv_transfer.transport import Buffer
from kv_transfer.transports.frames import HEADER_BYTES, FrameHeader, pack_header, unpack_header
from kv_transfer.transports.mover import Mover, until_done
from kv_transfer.transports.posted import PostedReceive
from kv_transfer.transports.tcp_inbox import Inbox
from pdserve.errors import TransferFailed

_LONG_BYTES = 256 * 1024  # so much is not copied in the loop
_DISCARD_BYTES = 256 * 1024


class TcpStream:
    """`sock`: connected, not blocking. `lose` is told why it is of no use any more, and calls `shut`."""

    def __init__(self, sock: socket.socket, inbox: Inbox, lose: Callable[[str], None]) -> None:
        self._sock = sock
        self._inbox = inbox
        self._lose = lose
        self._loop = asyncio.get_running_loop()
        self._queued_bytes = 0
        self._shut = False
        self._receiving = True
        self._sender = Mover("kv-tcp-send")
        threading.Thread(target=self._receive, name="kv-tcp-receive", daemon=True).start()

    @property
    def queued_bytes(self) -> int:
        """Given to be sent, and not sent yet."""
        return self._queued_bytes

    # ---- sending

    async def send(self, tag: int, buffer: Buffer) -> None:
        """Raises OSError. A cancelled send loses the socket: half a frame cannot be taken back."""
        header, sent = pack_header(tag, len(buffer)), 0
        if len(buffer) < _LONG_BYTES and not self._sender.busy:
            with contextlib.suppress(BlockingIOError):
                sent = self._sock.sendmsg((header, buffer))
        if sent == HEADER_BYTES + len(buffer):
            return
        self._queued_bytes += len(buffer)
        sending = self._sender.start(functools.partial(_send_rest, self._sock, header, buffer, sent))
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError:
            self._lose("a send was cancelled")
            await until_done(sending)
            raise
        finally:
            self._queued_bytes -= len(buffer)
            self._close_when_still()

    # ---- the end

    def shut(self) -> None:
        """Ends what is sent and received. A receive in progress fails when its thread has left the buffer."""
        if self._shut:
            return
        self._shut = True
        with contextlib.suppress(OSError):  # ENOTCONN: the peer was faster
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes the threads
        self._sender.end()
        self._close_when_still()

    def _close_when_still(self) -> None:
        """Not while a thread uses the descriptor's number, which another socket would get."""
        if self._shut and not self._receiving and not self._queued_bytes:
            self._sock.close()

    # ---- receiving, in its thread

    def _receive(self) -> None:
        reason = "its reader failed"
        try:
            while True:
                self._receive_message(self._receive_header())
        except TransferFailed as error:
            reason = error.message
        except OSError as error:
            reason = str(error)
        finally:
            self._tell(self._end_receiving, reason)

    def _receive_header(self) -> FrameHeader:
        header = bytearray(HEADER_BYTES)
        _receive_all(self._sock, memoryview(header))
        return unpack_header(header)

    def _receive_message(self, frame: FrameHeader) -> None:
        receive = self._inbox.take(frame.tag)
        if receive is None or len(receive.buffer) != frame.length_bytes:
            if receive is not None:
                self._refuse(receive, frame)
            _discard_all(self._sock, frame.length_bytes)
            return
        try:
            _receive_all(self._sock, receive.buffer)
        except OSError as error:
            self._tell(receive.fail, f"KV connection lost inside message {frame.tag}: {error}.")
            raise
        self._tell(receive.complete)

    def _refuse(self, receive: PostedReceive, frame: FrameHeader) -> None:
        wanted = len(receive.buffer)
        self._tell(receive.fail, f"KV message {frame.tag} has {frame.length_bytes} bytes, expected were {wanted}.")

    def _tell(self, call: Callable[..., None], *arguments: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(call, *arguments)

    def _end_receiving(self, reason: str) -> None:
        self._receiving = False
        self._lose(reason)
        self._close_when_still()


def _send_rest(sock: socket.socket, header: bytes, buffer: Buffer, sent: int) -> None:
    _send_all(sock, memoryview(header)[sent:], socket.MSG_MORE)
    _send_all(sock, buffer[max(0, sent - HEADER_BYTES) :])


def _send_all(sock: socket.socket, rest: memoryview, flags: int = 0) -> None:
    while rest:
        try:
            rest = rest[sock.send(rest, flags) :]
        except BlockingIOError:
            _wait(sock, select.POLLOUT)


def _receive_all(sock: socket.socket, rest: memoryview) -> None:
    while rest:
        try:
            count = sock.recv_into(rest)
        except BlockingIOError:
            _wait(sock, select.POLLIN)
            continue
        if not count:
            raise ConnectionResetError("the peer closed it")
        rest = rest[count:]


def _discard_all(sock: socket.socket, count: int) -> None:
    scratch = memoryview(bytearray(min(count, _DISCARD_BYTES)))
    while count:
        piece = min(count, len(scratch))
        _receive_all(sock, scratch[:piece])
        count -= piece


def _wait(sock: socket.socket, event: int) -> None:
    """Until `TcpStream.shut` at the latest."""
    poll = select.poll()
    poll.register(sock, event)
    poll.poll()
