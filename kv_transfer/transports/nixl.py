"""Owns the nixl transport: a door on a plain socket, behind it a NIXL agent for every peer.

For one host, through process_vm_readv, and for RDMA (untested: we have none). Not over TCP: see `nixl_reach`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

from kv_transfer.transport import Connection
from kv_transfer.transports.doorway import Doorway, knock
from kv_transfer.transports.nixl_connection import NixlConnection
from kv_transfer.transports.nixl_library import load_library
from kv_transfer.transports.pump import Pump
from pdserve.errors import TransferFailed


class NixlTransport:
    """`profile` of `ucx_profiles`; `hello_s`: deadline for a peer to come in. Raises ConfigInvalid without the library."""

    def __init__(self, host: str, profile: str, hello_s: float) -> None:
        self._library = load_library(profile)
        self._pump = Pump()
        self._door = Doorway("nixl", host, hello_s)
        self._connections: set[NixlConnection] = set()

    @property
    def name(self) -> str:
        return "nixl"

    async def listen(self, on_connection: Callable[[Connection, bytes], Awaitable[None]]) -> str:
        async def on_guest(sock: socket.socket, hello: bytes) -> None:
            await on_connection(await self._meet(sock), hello)

        return await self._door.open(on_guest)

    async def connect(self, address: str, hello: bytes, deadline_s: float) -> Connection:
        try:
            async with asyncio.timeout(deadline_s):
                return await self._meet(await knock(address, hello))
        except (OSError, ValueError) as error:  # TimeoutError is an OSError
            raise TransferFailed(
                f"Cannot connect to the KV endpoint nixl {address}: {str(error) or 'timeout'}."
            ) from error

    async def _meet(self, sock: socket.socket) -> NixlConnection:
        try:
            connection = NixlConnection(self._library.open_agent(), self._pump, self._library)
            await connection.meet(sock)
        except self._library.errors as error:
            sock.close()
            raise TransferFailed(f"The peer did not connect: {str(error) or 'timeout'}.") from error
        self._connections = {known for known in self._connections if not known.closed}
        self._connections.add(connection)
        return connection

    async def close(self) -> None:
        await self._door.close()
        for connection in self._connections:
            await connection.close()
        self._pump.stop()
