"""Owns what a sender keeps per decode worker: the gRPC channel and one data connection per transport."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping

import grpc

from kv_transfer.transport import Connection, Transport
from kv_transfer.transports.frames import HELLO_BYTES
from pdserve.errors import ConfigInvalid
from pdserve.v1 import types_pb2
from service_kit.config import TransferConfig
from service_kit.grpc_server import open_channel

OpenChannel = Callable[[str], grpc.aio.Channel]

_MAX_CHANNELS = 512


def open_insecure_channel(address: str) -> grpc.aio.Channel:
    return open_channel(address, None)


class PeerLink:
    """One data connection and its window. The peer knows the connection by `hello`."""

    def __init__(self, connection: Connection, hello: bytes, max_in_flight: int) -> None:
        self.connection = connection
        self.hello = hello
        self.window = asyncio.Semaphore(max_in_flight)


class Peers:
    """Channels and links, opened on first use, kept while they work."""

    def __init__(self, transports: Mapping[str, Transport], config: TransferConfig, open_channel: OpenChannel) -> None:
        self._transports = transports
        self._config = config
        self._open_channel = open_channel
        self._channels: OrderedDict[str, grpc.aio.Channel] = OrderedDict()
        self._links: dict[tuple[str, str], PeerLink] = {}
        self._connecting: dict[tuple[str, str], asyncio.Lock] = {}
        self._retiring: set[asyncio.Task[None]] = set()

    def channel(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.pop(address, None) or self._open_channel(address)
        self._channels[address] = channel
        if len(self._channels) > _MAX_CHANNELS:
            _, oldest = self._channels.popitem(last=False)
            task = asyncio.ensure_future(oldest.close(self._config.lease_s))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        return channel

    async def link(self, endpoint: types_pb2.KvEndpoint) -> PeerLink:
        """The link to `endpoint`, connected. Raises TransferFailed after `connect_s`."""
        transport = self._transports.get(endpoint.transport)
        if transport is None:
            raise ConfigInvalid(
                f"The grant names transport {endpoint.transport!r}, this worker has {sorted(self._transports)}."
            )
        key = (endpoint.transport, endpoint.address)
        async with self._connecting.setdefault(key, asyncio.Lock()):
            link = self._links.get(key)
            if link is None or link.connection.closed:
                self._forget_closed()
                hello = secrets.token_bytes(HELLO_BYTES)
                connection = await transport.connect(endpoint.address, hello, self._config.connect_s)
                link = self._links[key] = PeerLink(connection, hello, self._config.max_in_flight)
            return link

    def _forget_closed(self) -> None:
        for key in [key for key, link in self._links.items() if link.connection.closed]:
            del self._links[key]
            if key in self._connecting and not self._connecting[key].locked():
                del self._connecting[key]

    async def close(self) -> None:
        for link in self._links.values():
            await link.connection.close()
        for channel in self._channels.values():
            await channel.close(None)
        await asyncio.gather(*self._retiring, return_exceptions=True)
