"""Owns a twin of ucx-py's shape over ucxx: posted receives only, no probe, `closed()` a method. ucp itself has no wheel."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import cast

from kv_transfer.transport import Buffer
from kv_transfer.transports.ucx import load_binding
from kv_transfer.transports.ucx_connection import Binding, Endpoint, Listener, is_closed


class UcpShapedEndpoint:
    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def send(self, buffer: Buffer | bytes, tag: int | None = None, force_tag: bool = False) -> None:
        await self._endpoint.send(buffer, tag=tag, force_tag=force_tag)

    async def recv(self, buffer: Buffer | bytearray, tag: int | None = None, force_tag: bool = False) -> None:
        await self._endpoint.recv(buffer, tag=tag, force_tag=force_tag)

    def abort(self) -> None:
        self._endpoint.abort()

    def closed(self) -> bool:
        return is_closed(self._endpoint)


class UcpShapedBinding:
    probes = False

    def __init__(self, binding: Binding) -> None:
        self._binding = binding

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        return self._binding.errors

    def progress(self) -> None:
        self._binding.progress()

    def create_listener(self, on_endpoint: Callable[[Endpoint], Awaitable[None]]) -> Listener:
        async def wrapped(endpoint: Endpoint) -> None:
            await on_endpoint(cast(Endpoint, UcpShapedEndpoint(endpoint)))

        return self._binding.create_listener(wrapped)

    async def create_endpoint(self, host: str, port: int) -> Endpoint:
        return cast(Endpoint, UcpShapedEndpoint(await self._binding.create_endpoint(host, port)))


def load_ucp_shape(profile: str) -> UcpShapedBinding:
    return UcpShapedBinding(load_binding(profile))
