"""Owns the door of a transport that listens on a socket: who connects says a hello, within a deadline."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

from kv_transfer.transports.frames import WIRE_HELLO_BYTES, pack_hello, unpack_hello
from pdserve.errors import TransferFailed
from service_kit.logs import get_logger

_log = get_logger(__name__)

_BACKLOG = 512

# Gets the socket and the hello; owns the socket once it returns, and may raise TransferFailed or OSError instead.
OnGuest = Callable[[socket.socket, bytes], Awaitable[None]]


class Doorway:
    """Listens on `host`, port chosen by the system. A guest has `hello_s` for all that comes before it is let in."""

    def __init__(self, transport: str, host: str, hello_s: float) -> None:
        self._transport = transport
        self._host = host
        self._hello_s = hello_s
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self, on_guest: OnGuest) -> str:
        """Returns "host:port"."""
        loop = asyncio.get_running_loop()
        family, kind, proto, _, where = (await loop.getaddrinfo(self._host, 0, type=socket.SOCK_STREAM))[0]
        listener = socket.socket(family, kind, proto)
        listener.setblocking(False)
        listener.bind(where)
        listener.listen(_BACKLOG)
        self._listener = listener
        self._keep(asyncio.create_task(self._accept(listener, on_guest)))
        return f"{self._host}:{listener.getsockname()[1]}"

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket, on_guest: OnGuest) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                # Out of descriptors, or the peer left before accept: the listener lives on.
                _log.warning("kv_accept_failed", error=str(error))
                await asyncio.sleep(0.1)
                continue
            self._keep(asyncio.create_task(self._greet(sock, on_guest)))

    async def _greet(self, sock: socket.socket, on_guest: OnGuest) -> None:
        let_in = False
        try:
            prepare(sock)
            async with asyncio.timeout(self._hello_s):
                hello = unpack_hello(await read_exactly(sock, WIRE_HELLO_BYTES))
                await on_guest(sock, hello)
            let_in = True
        except (OSError, TransferFailed) as error:  # TimeoutError is an OSError
            _log.warning("kv_hello_refused", transport=self._transport, error=str(error) or "timeout")
        finally:
            if not let_in:
                sock.close()

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()


async def knock(address: str, hello: bytes) -> socket.socket:
    """Connects to a doorway at "host:port" and says `hello`. Raises OSError or ValueError; the deadline is the caller's."""
    loop = asyncio.get_running_loop()
    message = pack_hello(hello)
    host, _, port = address.rpartition(":")
    family, kind, proto, _, where = (await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM))[0]
    sock = socket.socket(family, kind, proto)
    try:
        prepare(sock)
        await loop.sock_connect(sock, where)
        await loop.sock_sendall(sock, message)
    except BaseException:
        sock.close()
        raise
    return sock


def prepare(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


async def read_exactly(sock: socket.socket, count: int) -> bytes:
    """Raises TransferFailed where the peer leaves first."""
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < count:
        chunk = await loop.sock_recv(sock, count - len(data))
        if not chunk:
            raise TransferFailed("The peer left before its hello.")
        data += chunk
    return data
