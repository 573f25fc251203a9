"""Owns what is used of `ucxx`: one context per peer, endpoints, arrivals. The only file that imports it.

Requests are driven by our own progress (`pump.Pump`): ucxx's tasks burn a core as soon as one endpoint was connected.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Protocol, cast

from kv_transfer.transport import Buffer
from kv_transfer.transports.ucx_profiles import apply_profile
from pdserve.errors import ConfigInvalid


class Arrival(Protocol):
    """ucxx's TagProbeResult: a message that came and is not received yet."""

    @property
    def matched(self) -> bool: ...

    @property
    def length(self) -> int: ...


class Endpoint(Protocol):
    def send(
        self, buffer: Buffer | bytes, tag: int | None = None, force_tag: bool = False
    ) -> Coroutine[None, None, None]: ...

    def tag_probe(self, tag: int | None = None, force_tag: bool = False, remove: bool = False) -> Arrival: ...

    def recv_with_handle(self, buffer: Buffer | bytearray, probe_result: Arrival) -> Coroutine[None, None, None]: ...

    def abort(self) -> None: ...

    @property
    def closed(self) -> bool: ...


class Listener(Protocol):
    @property
    def port(self) -> int: ...

    @property
    def active_clients(self) -> int: ...

    def close(self) -> None: ...


class _Worker(Protocol):
    def progress_once(self) -> bool:
        """True where something moved."""

    def init_blocking_progress_mode(self) -> None:
        """Makes the descriptor."""

    def arm(self) -> bool:
        """True where the descriptor tells of the next event; False where there is something to progress."""

    @property
    def epoll_file_descriptor(self) -> int: ...


class Context(Protocol):
    """ucxx's ApplicationContext: a UCX context and its one worker."""

    @property
    def worker(self) -> _Worker: ...

    def create_listener(
        self, callback_func: Callable[[Endpoint], Awaitable[None]], port: int = 0, endpoint_error_handling: bool = True
    ) -> Listener: ...

    async def create_endpoint(
        self, ip_address: str, port: int, endpoint_error_handling: bool = True, connect_timeout: float = 5.0
    ) -> Endpoint: ...


class UcxLibrary:
    """`errors`: what it and the socket before it raise when a peer, an address or a message fails."""

    def __init__(self, make_context: Callable[[], Context], errors: tuple[type[Exception], ...]) -> None:
        self.open_context = make_context
        self.errors = errors


def is_installed(profile: str) -> bool:
    """True where ucxx imports. Applies `profile`, since the import reads it."""
    apply_profile(profile)
    try:
        importlib.import_module("ucxx")
    except ImportError:
        return False
    return True


@functools.cache
def load_library(profile: str) -> UcxLibrary:
    """Raises ConfigInvalid where ucxx is not installed. UCX reads a profile once per process: the first one holds."""
    if not is_installed(profile):
        raise ConfigInvalid("transfer.transport is ucx, but ucxx is not installed: pip install 'pdserve[ucx]'.")
    exceptions = importlib.import_module("ucxx.exceptions")
    module = importlib.import_module("ucxx._lib_async.application_context")
    # Progress is ours: a context that starts none.
    quiet = type("QuietContext", (module.ApplicationContext,), {"continuous_ucx_progress": lambda *_: None})
    # Errors of the C++ side share a base of their own.
    errors = (exceptions.UCXError, exceptions.UCXCanceled.__base__, OSError, ValueError)
    return UcxLibrary(lambda: cast(Context, quiet(progress_mode="polling")), errors)
