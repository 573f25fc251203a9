"""Owns the HTTP server: a bound socket first, so that the port is known, then uvicorn in the running loop, without its signals.

uvicorn waits for ever for a client that takes nothing of its answer: such connections are cut here, which the request behind
one sees as a client that went away.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import sys
import termios
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from controller.stalled_clients import StalledClients
from pdserve.errors import ConfigInvalid
from service_kit.config import SecurityConfig
from service_kit.logs import get_logger

BACKLOG = 2048
GRACE_S = 2  # for answers that are being written when the server stops
LOOKS_PER_STALL = 4  # at the connections: one is cut after 1 to 1.25 times the time

log = get_logger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """Raises ConfigInvalid where the port is taken or the address is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
    except OSError as error:
        listener.close()
        raise ConfigInvalid(
            f"controller.port = {port}: cannot be bound on {host}: {error.strerror}. Use another port, or 0 for a free one."
        ) from error
    listener.setblocking(False)
    return listener


def waiting_bytes(transport: asyncio.Transport) -> int:
    """Of what was written, that has not reached the client's kernel; 0 while ours takes all that is written."""
    buffered = transport.get_write_buffer_size()
    return buffered + _queued_bytes(transport) if buffered else 0


def _queued_bytes(transport: asyncio.Transport) -> int:
    """In our kernel, sent or not, that the other side has not acknowledged (SIOCOUTQ); 0 where the kernel does not tell."""
    told = bytearray(4)
    try:
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, told)
    except (OSError, ValueError):  # another system, or closed just now
        return 0
    return int.from_bytes(told, sys.byteorder)


class _QuietServer(uvicorn.Server):
    """The process's signals belong to `controller.__main__`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    def __init__(self, app: ASGIApp, listener: socket.socket, security: SecurityConfig, client_stall_s: float) -> None:
        self._listener = listener
        self._client_stall_s = client_stall_s
        self._server = _QuietServer(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_graceful_shutdown=GRACE_S,
                ssl_certfile=security.tls_cert,
                ssl_keyfile=security.tls_key,
            )
        )

    def url(self, host: str, *, tls: bool) -> str:
        return f"{'https' if tls else 'http'}://{host}:{self._listener.getsockname()[1]}"

    async def serve(self) -> None:
        """Until `stop`."""
        async with asyncio.TaskGroup() as group:
            cutting = group.create_task(self._cut_stalled(), name="controller-http-stalls")
            await self._server.serve(sockets=[self._listener])
            cutting.cancel()

    async def _cut_stalled(self) -> None:
        loop, clients = asyncio.get_running_loop(), StalledClients[asyncio.Transport](self._client_stall_s)
        while True:
            await asyncio.sleep(self._client_stall_s / LOOKS_PER_STALL)
            transports = [connection.transport for connection in self._server.server_state.connections]
            waiting = {transport: waiting_bytes(transport) for transport in transports}
            for transport in clients.look(waiting, loop.time()):
                log.warning("client_stalled", waiting_bytes=waiting[transport])
                transport.abort()  # to close it would wait for the client

    async def started(self) -> None:
        """The caller puts it under a deadline."""
        while not self._server.started:  # noqa: ASYNC110 (uvicorn has no event for it)
            await asyncio.sleep(0.005)

    def stop(self) -> None:
        self._server.should_exit = True
