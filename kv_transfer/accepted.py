"""Owns the data connections that peers opened to this receiver, until a Begin names them."""

from __future__ import annotations

import asyncio

from kv_transfer.transport import Connection
from pdserve.errors import TransferFailed
from service_kit.logs import get_logger

_log = get_logger(__name__)

# Connections that no Begin has named yet, and Begins that wait for theirs.
_MAX_UNCLAIMED = 1024


class AcceptedConnections:
    """By (transport, hello). One that nobody claims in `claim_s` is closed; a claimed one lives until it closes."""

    def __init__(self, claim_s: float) -> None:
        self._claim_s = claim_s
        self._claimed: dict[tuple[str, bytes], Connection] = {}
        self._unclaimed: dict[tuple[str, bytes], tuple[Connection, asyncio.TimerHandle]] = {}
        self._wanted: dict[tuple[str, bytes], list[asyncio.Future[None]]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def add(self, transport: str, connection: Connection, hello: bytes) -> None:
        """A peer connected. A hello that is known already is an impostor's: that connection is closed."""
        key = (transport, hello)
        if key in self._claimed or key in self._unclaimed or len(self._unclaimed) >= _MAX_UNCLAIMED:
            _log.warning("kv_connection_refused", transport=transport, reason="hello known, or too many unclaimed")
            await connection.close()
            return
        timer = asyncio.get_running_loop().call_later(self._claim_s, self._expire, key)
        self._unclaimed[key] = (connection, timer)
        for waiting in self._wanted.get(key, ()):
            if not waiting.done():
                waiting.set_result(None)

    async def claim(self, transport: str, hello: bytes) -> Connection:
        """The connection that said `hello`; waits for it `claim_s` at most, since Begin may be faster."""
        key = (transport, hello)
        if key not in self._claimed and key not in self._unclaimed:
            await self._wait_for(key)
        if (entry := self._unclaimed.pop(key, None)) is not None:
            connection, timer = entry
            timer.cancel()
            self._forget_closed()
            self._claimed[key] = connection
        claimed = self._claimed.get(key)
        if claimed is None or claimed.closed:
            raise TransferFailed("The data connection that Begin names is closed.")
        return claimed

    async def _wait_for(self, key: tuple[str, bytes]) -> None:
        """Several hand-offs of a peer may wait for their one connection."""
        if sum(map(len, self._wanted.values())) >= _MAX_UNCLAIMED:
            raise TransferFailed("Too many hand-offs wait for their data connection.")
        waiters = self._wanted.setdefault(key, [])
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters.append(waiting)
        try:
            async with asyncio.timeout(self._claim_s):
                await waiting
        except TimeoutError:
            raise TransferFailed(f"The data connection that Begin names did not come in {self._claim_s:g} s.") from None
        finally:
            waiters.remove(waiting)
            if not waiters:
                self._wanted.pop(key, None)

    def _expire(self, key: tuple[str, bytes]) -> None:
        connection, _ = self._unclaimed.pop(key)
        _log.warning("kv_connection_unclaimed", transport=key[0])
        self._close_later(connection)

    def _forget_closed(self) -> None:
        self._claimed = {key: connection for key, connection in self._claimed.items() if not connection.closed}

    def _close_later(self, connection: Connection) -> None:
        task = asyncio.ensure_future(connection.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        for connection, timer in self._unclaimed.values():
            timer.cancel()
            self._close_later(connection)
        for connection in self._claimed.values():
            self._close_later(connection)
        self._unclaimed.clear()
        self._claimed.clear()
        await asyncio.gather(*self._closing, return_exceptions=True)
