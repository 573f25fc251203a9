"""Owns the Transport and Connection protocols: exact bytes under a tag, between two io processes. Torch-free.

Implementations: `kv_transfer.transports.{ucx,nixl,tcp,inproc}`. Contract suite: tests/contracts/test_transport_contract.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

Buffer = memoryview  # contiguous, format "B"; writable for receives


class Connection(Protocol):
    """One connection between two peers. Sends and receives match by tag; a tag is used once and never again.

    Both calls raise `TransferFailed` when the peer or the connection is gone, and are cancellable: after a cancelled or failed
    `recv` returns, its buffer is not written any more (if that needs it, the connection is closed).
    """

    async def send(self, tag: int, buffer: Buffer) -> None:
        """Completes when `buffer` may be reused. That is not delivery: wait for the receiver's word on the control session."""

    async def recv(self, tag: int, buffer: Buffer) -> None:
        """Fills `buffer` with exactly len(buffer) bytes. A message of another length raises `TransferFailed`."""

    async def close(self) -> None: ...

    @property
    def closed(self) -> bool: ...


class Transport(Protocol):
    """One transport of one process."""

    @property
    def name(self) -> str: ...

    async def listen(self, on_connection: Callable[[Connection, bytes], Awaitable[None]]) -> str:
        """Starts to listen; returns "host:port". `on_connection` gets each connection with the 16-byte hello its peer sent."""

    async def connect(self, address: str, hello: bytes, deadline_s: float) -> Connection:
        """Connects and sends `hello` (16 bytes). Raises `TransferFailed` after `deadline_s`."""

    async def close(self) -> None: ...
