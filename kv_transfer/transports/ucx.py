"""Owns the ucx transport, over `ucxx` or, where that is absent, `ucp` (ucx-py). The only file that imports them.

The listener binds all interfaces (the library takes no address): peers are known by the one-time ticket of their hand-off.

UCX's own progress tasks burn a core as soon as one endpoint was connected, and so does a receive that waits. So progress is
ours (`Pump`): every turn of the loop while a transfer is active, else every few milliseconds; and no receive is posted
before its message has arrived (tag probe), which also gives the exact length and leaves nothing behind after a cancel.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import socket
from collections.abc import Awaitable, Callable
from typing import Protocol, cast

from kv_transfer.transport import Connection
from kv_transfer.transports.frames import WIRE_HELLO_BYTES, pack_hello, unpack_hello
from kv_transfer.transports.ucx_connection import (
    IDLE_S,
    Binding,
    Endpoint,
    Listener,
    ProbingEndpoint,
    Pump,
    UcxConnection,
    is_closed,
)
from kv_transfer.transports.ucx_profiles import apply_profile
from pdserve.errors import ConfigInvalid, TransferFailed
from service_kit.logs import get_logger

_log = get_logger(__name__)

_OnConnection = Callable[[Connection, bytes], Awaitable[None]]

# ---- the libraries


class _Library(Protocol):
    """The module `ucxx` or `ucp`."""

    def progress(self) -> object: ...

    def create_listener(
        self, callback_func: Callable[[Endpoint], Awaitable[None]], port: int, endpoint_error_handling: bool
    ) -> Listener: ...

    async def create_endpoint(self, ip_address: str, port: int, endpoint_error_handling: bool) -> Endpoint: ...


class _UcxxLibrary(_Library, Protocol):
    def init(self, *, progress_mode: str) -> None: ...


class _UcpLibrary(_Library, Protocol):
    def init(self, *, blocking_progress_mode: bool) -> None: ...


class LibraryBinding:
    """Adapts a module of either library. Always sockaddr endpoints with error handling: else a dead peer is not seen."""

    def __init__(self, library: _Library, errors: tuple[type[Exception], ...], *, probes: bool) -> None:
        self._library = library
        self.errors = (*errors, OSError)
        self.probes = probes

    def progress(self) -> None:
        self._library.progress()

    def create_listener(self, on_endpoint: Callable[[Endpoint], Awaitable[None]]) -> Listener:
        return self._library.create_listener(on_endpoint, 0, endpoint_error_handling=True)

    async def create_endpoint(self, host: str, port: int) -> Endpoint:
        return await self._library.create_endpoint(host, port, endpoint_error_handling=True)


def _load_ucxx() -> LibraryBinding:
    library = cast(_UcxxLibrary, importlib.import_module("ucxx"))
    exceptions = importlib.import_module("ucxx.exceptions")
    # Errors of the C++ side share a base of their own.
    errors = (exceptions.UCXError, exceptions.UCXCanceled.__base__)
    # Registered as "progress is provided for this loop", so that ucxx starts no task of its own: see the module's text.
    contexts = importlib.import_module("ucxx._lib_async.application_context")
    cast("dict[asyncio.AbstractEventLoop, object]", contexts.ProgressTasks)[asyncio.get_running_loop()] = Pump
    with contextlib.suppress(RuntimeError):  # initiated already, by an earlier transport of this process
        library.init(progress_mode="polling")
    return LibraryBinding(library, errors, probes=True)


def _load_ucp() -> LibraryBinding:
    library = cast(_UcpLibrary, importlib.import_module("ucp"))
    errors = (importlib.import_module("ucp.exceptions").UCXBaseException,)
    with contextlib.suppress(RuntimeError):
        library.init(blocking_progress_mode=True)
    return LibraryBinding(library, errors, probes=False)


def load_binding(profile: str) -> Binding:
    """The library's binding for this process and the running loop. Raises ConfigInvalid where neither is installed."""
    apply_profile(profile)
    for load in (_load_ucxx, _load_ucp):
        with contextlib.suppress(ImportError):
            return load()
    raise ConfigInvalid("transfer.transport is ucx, but neither ucxx nor ucp is installed: pip install 'pdserve[ucx]'.")


def is_available(profile: str) -> bool:
    """True where a binding imports. Applies `profile`, since the import reads it."""
    apply_profile(profile)
    for name in ("ucxx", "ucp"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
            return True
    return False


# ---- the transport


class UcxTransport:
    """One UCX context serves the whole process; so transports of one process share its settings. `hello_s`: deadline of a
    peer's hello. `load` gives the binding at first use, on the loop that will drive it."""

    def __init__(self, host: str, profile: str, hello_s: float, load: Callable[[str], Binding] = load_binding) -> None:
        self._host = host
        self._profile = profile
        self._hello_s = hello_s
        self._load = load
        self._open: tuple[Binding, Pump] | None = None
        self._listener: Listener | None = None
        self._connections: set[UcxConnection] = set()

    @property
    def name(self) -> str:
        return "ucx"

    @property
    def probes(self) -> bool:
        """True where the length of a message is known before it is received."""
        return self._opened()[0].probes

    def _opened(self) -> tuple[Binding, Pump]:
        if self._open is None:
            binding = self._load(self._profile)
            self._open = (binding, Pump(binding))
        return self._open

    async def listen(self, on_connection: _OnConnection) -> str:
        binding, _ = self._opened()

        async def greet(endpoint: Endpoint) -> None:
            await self._greet(endpoint, on_connection)

        self._listener = binding.create_listener(greet)
        return f"{self._host}:{self._listener.port}"

    async def _greet(self, endpoint: Endpoint, on_connection: _OnConnection) -> None:
        binding, _ = self._opened()
        data = bytearray(WIRE_HELLO_BYTES)
        refusals: tuple[type[Exception], ...] = (TransferFailed, TimeoutError, *binding.errors)
        try:
            async with asyncio.timeout(self._hello_s):
                if binding.probes:
                    await _wait_for_hello(cast(ProbingEndpoint, endpoint))
                await endpoint.recv(data)
            hello = unpack_hello(bytes(data))
        except refusals as error:
            _log.warning("kv_hello_refused", transport="ucx", error=str(error) or "timeout")
            endpoint.abort()
            return
        except asyncio.CancelledError:
            endpoint.abort()
            raise
        await on_connection(self._own(endpoint), hello)

    async def connect(self, address: str, hello: bytes, deadline_s: float) -> Connection:
        binding, pump = self._opened()
        message = pack_hello(hello)
        failures: tuple[type[Exception], ...] = (ValueError, *binding.errors)  # TimeoutError is an OSError
        endpoint: Endpoint | None = None
        try:
            with pump.active():
                async with asyncio.timeout(deadline_s):
                    host, _, port = address.rpartition(":")
                    where = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
                    endpoint = await binding.create_endpoint(str(where[0][4][0]), int(port))
                    await endpoint.send(message)
        except failures as error:
            if endpoint is not None:
                endpoint.abort()
            raise TransferFailed(f"Cannot connect to the KV endpoint ucx {address}: {error or 'timeout'}.") from error
        except asyncio.CancelledError:
            if endpoint is not None:
                endpoint.abort()
            raise
        return self._own(endpoint)

    def _own(self, endpoint: Endpoint) -> UcxConnection:
        binding, pump = self._opened()
        self._connections = {connection for connection in self._connections if not connection.closed}
        connection = UcxConnection(endpoint, binding, pump)
        self._connections.add(connection)
        return connection

    async def close(self) -> None:
        for connection in self._connections:
            await connection.close()
        if self._listener is not None:
            self._listener.close()
        if self._open is not None:
            self._open[1].stop()


async def _wait_for_hello(endpoint: ProbingEndpoint) -> None:
    """A posted receive would burn a core for every peer that connects and says nothing."""
    while not endpoint.tag_probe().matched:
        if is_closed(endpoint):
            raise TransferFailed("The peer left before its hello.")
        await asyncio.sleep(IDLE_S)
