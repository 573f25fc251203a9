"""The sockets and threads of a tcp connection: how they come together, what a receive that is given up leaves, how they end."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from kv_transfer.transport import Connection
from kv_transfer.transports.frames import pack_header, pack_hello
from kv_transfer.transports.mover import Mover, until_done
from kv_transfer.transports.tcp import TcpTransport
from pdserve.errors import TransferFailed
from tests.kv_transfer.rig import eventually

DEADLINE_S = 20.0
LONG = 4 * 2**20
_tags = itertools.count(1)


class House:
    """A listening transport; `raw` knocks by hand."""

    def __init__(self, hello_s: float) -> None:
        self.transport = TcpTransport("127.0.0.1", post_s=5.0, hello_s=hello_s, streams=2)
        self.came: asyncio.Queue[tuple[Connection, bytes]] = asyncio.Queue()
        self.address = ""

    async def open(self) -> None:
        self.address = await self.transport.listen(self._on_connection)

    async def _on_connection(self, connection: Connection, hello: bytes) -> None:
        await self.came.put((connection, hello))

    async def guest(self) -> Connection:
        async with asyncio.timeout(DEADLINE_S):
            connection, _ = await self.came.get()
            return connection

    async def raw(self, ticket: bytes, ordinal: int, count: int, hello: bytes = b"h" * 16) -> socket.socket:
        host, port = self.address.split(":")
        sock = socket.socket()
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, (host, int(port)))
        await loop.sock_sendall(sock, pack_hello(hello) + struct.pack("<16sBB", ticket, ordinal, count))
        return sock

    async def lone(self) -> tuple[socket.socket, Connection]:
        """A connection of one socket, by hand at its other end."""
        sock = await self.raw(secrets.token_bytes(16), 0, 1)
        return sock, await self.guest()


@pytest_asyncio.fixture
async def house() -> AsyncIterator[House]:
    made = House(hello_s=0.3)
    await made.open()
    yield made
    await made.transport.close()


async def is_shut(sock: socket.socket) -> bool:
    """Whether the other side ends the connection, within the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        try:
            return not await asyncio.get_running_loop().sock_recv(sock, 1)
        except ConnectionResetError:
            return True


# ---- together


async def test_sockets_that_come_in_any_order_are_one_connection(house: House) -> None:
    ticket = secrets.token_bytes(16)
    first, second = await house.raw(ticket, 1, 2), await house.raw(ticket, 0, 2)
    connection = await house.guest()
    loop = asyncio.get_running_loop()
    for sock in (first, second):
        tag = next(_tags)
        buffer = bytearray(5)
        receive = asyncio.create_task(connection.recv(tag, memoryview(buffer)))
        await loop.sock_sendall(sock, pack_header(tag, 5) + b"hello")
        async with asyncio.timeout(DEADLINE_S):
            await receive
        assert buffer == b"hello"
        assert house.came.empty()


async def test_a_connection_of_which_a_socket_is_missing_is_refused_in_time(house: House) -> None:
    sock = await house.raw(secrets.token_bytes(16), 0, 2)
    assert await is_shut(sock)
    assert house.came.empty()
    _, connection = await house.lone()
    assert not connection.closed


@pytest.mark.parametrize(
    ("ordinal", "count", "hello"),
    [
        (0, 2, b"h" * 16),
        (2, 2, b"h" * 16),
        (1, 3, b"h" * 16),
        (1, 2, b"x" * 16),
        (0, 0, b"h" * 16),
        (1, 200, b"h" * 16),
    ],
    ids=["twice the same", "past the end", "another count", "another hello", "none", "too many"],
)
async def test_a_socket_that_contradicts_the_others_ends_all_of_them(
    house: House, ordinal: int, count: int, hello: bytes
) -> None:
    ticket = secrets.token_bytes(16)
    first = await house.raw(ticket, 0, 2)
    second = await house.raw(ticket, ordinal, count, hello)
    assert await is_shut(first)
    assert await is_shut(second)
    assert house.came.empty()


# ---- inside a message


async def half_received(sock: socket.socket, connection: Connection, buffer: bytearray) -> asyncio.Task[None]:
    """A receive that has got the first half of its message."""
    tag = next(_tags)
    receive = asyncio.create_task(connection.recv(tag, memoryview(buffer)))
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, pack_header(tag, LONG) + b"\xff" * (LONG // 2))
    await eventually(lambda: buffer[LONG // 2 - 1] == 0xFF)
    return receive


async def test_a_receive_given_up_inside_a_message_that_stalls_ends_the_connection_and_leaves_its_buffer(
    house: House,
) -> None:
    sock, connection = await house.lone()
    buffer = bytearray(LONG)
    receive = await half_received(sock, connection, buffer)
    receive.cancel()
    begun_s = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await receive
    assert time.monotonic() - begun_s < DEADLINE_S
    assert connection.closed
    assert await is_shut(sock)
    assert not any(buffer[LONG // 2 :])


async def test_a_receive_given_up_inside_a_message_that_goes_on_keeps_the_connection(house: House) -> None:
    sock, connection = await house.lone()
    loop = asyncio.get_running_loop()
    receive = await half_received(sock, connection, bytearray(LONG))
    receive.cancel()
    await loop.sock_sendall(sock, b"\xff" * (LONG // 2))
    with pytest.raises(asyncio.CancelledError):
        await receive
    assert not connection.closed
    tag, after = next(_tags), bytearray(3)
    await loop.sock_sendall(sock, pack_header(tag, 3) + b"new")
    async with asyncio.timeout(DEADLINE_S):
        await connection.recv(tag, memoryview(after))
    assert after == b"new"


async def test_a_peer_that_leaves_inside_a_message_fails_its_receive(house: House) -> None:
    sock, connection = await house.lone()
    receive = await half_received(sock, connection, bytearray(LONG))
    sock.close()
    with pytest.raises(TransferFailed, match="inside message"):
        await receive
    await eventually(lambda: connection.closed)


async def test_a_send_given_up_while_the_peer_reads_nothing_ends_with_its_buffer_free(house: House) -> None:
    sock, connection = await house.lone()
    send = asyncio.create_task(connection.send(next(_tags), memoryview(bytearray(64 * 2**20))))
    await asyncio.get_running_loop().sock_recv(sock, 1)
    send.cancel()
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(asyncio.CancelledError):
            await send
    assert connection.closed


async def test_with_a_connection_its_threads_and_descriptors_end(house: House) -> None:
    before = threading.active_count()
    here = await house.transport.connect(house.address, b"h" * 16, DEADLINE_S)
    there = await house.guest()
    tag, buffer = next(_tags), bytearray(LONG)
    await asyncio.gather(here.send(tag, memoryview(bytes(LONG))), there.recv(tag, memoryview(buffer)))
    assert threading.active_count() > before
    await here.close()
    await eventually(lambda: there.closed)
    await eventually(lambda: threading.active_count() == before)


# ---- the thread


async def test_a_mover_does_one_call_after_the_other_and_tells_how_each_ended() -> None:
    mover, done = Mover("test"), list[int]()

    def fail() -> None:
        raise OSError("broken")

    calls = [mover.start(lambda: done.append(1)), mover.start(fail), mover.start(lambda: done.append(3))]
    assert mover.busy
    async with asyncio.timeout(DEADLINE_S):
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert done == [1, 3]
    assert [str(each) for each in results] == ["None", "broken", "None"]
    assert not mover.busy
    mover.end()


async def test_who_waits_for_a_call_is_cancelled_when_it_has_ended() -> None:
    mover, gate = Mover("test"), threading.Event()
    call = mover.start(lambda: assert_set(gate))
    waiter = asyncio.create_task(until_done(call))
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.sleep(0)
    assert not waiter.done()
    gate.set()
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(asyncio.CancelledError):
            await waiter
    assert call.done()
    mover.end()


def assert_set(gate: threading.Event) -> None:
    assert gate.wait(DEADLINE_S)
