"""Owns how the sockets of a tcp connection come together: each says the same ticket behind its hello, and which of how many it is."""

from __future__ import annotations

import asyncio
import secrets
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from kv_transfer.transports.doorway import knock, read_exactly
from pdserve.errors import TransferFailed

MOST_SOCKETS = 4  # of a connection: each has threads
_TICKET_BYTES = 16
_JOIN = struct.Struct(f"<{_TICKET_BYTES}sBB")  # ticket, ordinal, count

# Gets all sockets of a connection in order, and their hello.
OnGuests = Callable[[Sequence[socket.socket], bytes], Awaitable[None]]


async def knock_together(address: str, hello: bytes, count: int) -> list[socket.socket]:
    """`count` sockets of one connection. Raises as `doorway.knock` does; the deadline is the caller's."""
    ticket, sockets = secrets.token_bytes(_TICKET_BYTES), list[socket.socket]()
    try:
        for ordinal in range(count):
            sockets.append(await knock(address, hello))
            await asyncio.get_running_loop().sock_sendall(sockets[-1], _JOIN.pack(ticket, ordinal, count))
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


@dataclass(slots=True)
class _Party:
    hello: bytes
    count: int
    done: asyncio.Future[None]
    sockets: dict[int, socket.socket] = field(default_factory=dict)


class Joint:
    """The sockets that came in and wait for the others of their connection."""

    def __init__(self) -> None:
        self._parties: dict[bytes, _Party] = {}

    async def add(self, sock: socket.socket, hello: bytes, on_guests: OnGuests) -> None:
        """Returns when all sockets of the connection have come and `on_guests` has taken them. Raises TransferFailed or OSError; the
        deadline is the caller's, and an error of one is that of all."""
        ticket, ordinal, count = _JOIN.unpack(await read_exactly(sock, _JOIN.size))
        party = self._parties.get(ticket)
        if party is None:
            party = self._parties[ticket] = _Party(hello, count, asyncio.get_running_loop().create_future())
        try:
            if not 0 < count <= MOST_SOCKETS or ordinal >= count or ordinal in party.sockets:
                raise TransferFailed(f"A peer's socket says that it is number {ordinal} of {count}.")
            if (count, hello) != (party.count, party.hello):
                raise TransferFailed("Sockets of one connection say different things.")
            party.sockets[ordinal] = sock
            if len(party.sockets) == count:
                await on_guests([party.sockets[each] for each in range(count)], hello)
                party.done.set_result(None)
            else:
                await asyncio.shield(party.done)
        except BaseException as error:
            self._fail(party, error)
            raise
        finally:
            self._parties.pop(ticket, None)

    @staticmethod
    def _fail(party: _Party, error: BaseException) -> None:
        if not party.done.done():
            party.done.set_exception(TransferFailed(f"Another socket of the connection failed: {error}."))
            party.done.exception()  # seen: there may be no other one
