"""The contract of Transport and Connection, over ucx, tcp and inproc; `make test-nixl` runs it over nixl, which is optional and large.

PDSERVE_TEST_PROFILE is the profile of the settings for UCX (host).
PDSERVE_TEST_TRANSPORTS names others than those three. What it names is never skipped: without its library the tests fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import secrets
import socket
import struct
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import uvloop

from kv_transfer.transport import Connection, Transport
from kv_transfer.transports import open_transport, resolve
from pdserve.errors import ConfigInvalid, TransferFailed
from service_kit.config import TransferConfig

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONFIG = TransferConfig.model_validate({"connect_s": 2.0, "profile": os.environ.get("PDSERVE_TEST_PROFILE", "host")})
TRANSPORTS = os.environ.get("PDSERVE_TEST_TRANSPORTS", "ucx,tcp,inproc").split(",")
SLACK_S = 5.0  # of a busy machine
IDLE_SHARE = 0.2  # of one core; measured were 0.013 over ucx and less than 0.001 over tcp
_tags = itertools.count(secrets.randbits(62))


def open_named(name: str) -> Transport:
    return open_transport(name, CONFIG, "127.0.0.1")


class Pair:
    """A listening transport and a connecting one; `connect` gives both ends of a new connection."""

    def __init__(self, listening: Transport, connecting: Transport) -> None:
        self.name = listening.name
        self.listening = listening
        self.connecting = connecting
        self.address = ""
        self._accepted: dict[bytes, asyncio.Future[Connection]] = {}

    async def open(self) -> None:
        self.address = await self.listening.listen(self._on_connection)

    async def _on_connection(self, connection: Connection, hello: bytes) -> None:
        self._accepted[hello].set_result(connection)

    async def connect(self) -> tuple[Connection, Connection]:
        hello = secrets.token_bytes(16)
        self._accepted[hello] = asyncio.get_running_loop().create_future()
        here = await self.connecting.connect(self.address, hello, 5.0)
        async with asyncio.timeout(30):
            return here, await self._accepted[hello]


@pytest_asyncio.fixture(loop_scope="module", params=TRANSPORTS)
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    name = str(request.param)
    made = Pair(open_named(name), open_named(name))
    await made.open()
    yield made
    await made.connecting.close()
    await made.listening.close()


def random_bytes(size: int) -> bytes:
    return random.Random(size).randbytes(size)


async def send_all(connection: Connection, messages: dict[int, bytes]) -> None:
    async with asyncio.timeout(30):
        await asyncio.gather(*(connection.send(tag, memoryview(data)) for tag, data in messages.items()))


async def recv_one(connection: Connection, tag: int, size: int, deadline_s: float = 10.0) -> bytes:
    buffer = bytearray(size)
    async with asyncio.timeout(deadline_s):
        await connection.recv(tag, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize("size", [1, 7, 4096, 65_537, 4 * 2**20, 16 * 2**20])
async def test_a_message_of_any_size_arrives_as_it_was_sent(pair: Pair, size: int) -> None:
    here, there = await pair.connect()
    tag, data = next(_tags), random_bytes(size)
    sending = asyncio.create_task(send_all(here, {tag: data}))
    assert await recv_one(there, tag, size) == data
    await sending


async def test_both_directions_carry_messages_at_once(pair: Pair) -> None:
    here, there = await pair.connect()
    up, down = next(_tags), next(_tags)
    data = random_bytes(300_000)
    sends = asyncio.gather(send_all(here, {up: data}), send_all(there, {down: data[::-1]}))
    received = await asyncio.gather(recv_one(there, up, len(data)), recv_one(here, down, len(data)))
    assert list(received) == [data, data[::-1]]
    await sends


async def test_many_tags_at_once_are_told_apart(pair: Pair) -> None:
    here, there = await pair.connect()
    messages = {next(_tags): random_bytes(1000 + 977 * index) for index in range(64)}
    sending = asyncio.create_task(send_all(here, messages))
    received = await asyncio.gather(*(recv_one(there, tag, len(data)) for tag, data in messages.items()))
    assert received == list(messages.values())
    await sending


async def test_receives_may_be_posted_in_another_order_than_the_messages_come(pair: Pair) -> None:
    here, there = await pair.connect()
    messages = {next(_tags): random_bytes(50_000 + index) for index in range(8)}
    receives = [asyncio.create_task(recv_one(there, tag, len(data))) for tag, data in reversed(messages.items())]
    await send_all(here, messages)
    assert await asyncio.gather(*receives) == list(reversed(messages.values()))


async def test_a_receive_posted_after_its_message_came_gets_it(pair: Pair) -> None:
    here, there = await pair.connect()
    first, second = next(_tags), next(_tags)
    sending = asyncio.create_task(send_all(here, {first: b"a" * 5000, second: b"b" * 6000}))
    await asyncio.sleep(0)
    assert await recv_one(there, first, 5000) == b"a" * 5000
    assert await recv_one(there, second, 6000) == b"b" * 6000
    await sending


@pytest.mark.parametrize(("sent", "expected"), [(100, 99), (99, 100), (70_000, 5_000_000), (5_000_000, 70_000)])
async def test_a_message_of_another_length_fails_the_receive(pair: Pair, sent: int, expected: int) -> None:
    here, there = await pair.connect()
    tag = next(_tags)
    sending = asyncio.create_task(send_all(here, {tag: random_bytes(sent)}))
    with pytest.raises(TransferFailed):
        await recv_one(there, tag, expected)
    await asyncio.gather(sending, return_exceptions=True)


async def test_a_wrong_length_leaves_the_connection_usable(pair: Pair) -> None:
    here, there = await pair.connect()
    wrong, right = next(_tags), next(_tags)
    sending = asyncio.create_task(send_all(here, {wrong: b"x" * 900_000, right: b"y" * 10}))
    with pytest.raises(TransferFailed):
        await recv_one(there, wrong, 10)
    assert await recv_one(there, right, 10) == b"y" * 10
    await sending


@pytest.mark.parametrize("size", [100, 8 * 2**20])
async def test_the_peer_closing_fails_pending_receives_and_sends(pair: Pair, size: int) -> None:
    here, there = await pair.connect()
    receive = asyncio.create_task(recv_one(here, next(_tags), size))
    send = asyncio.create_task(send_all(here, {next(_tags): random_bytes(32 * 2**20)}))
    await asyncio.sleep(0)
    await there.close()
    with pytest.raises(TransferFailed):
        await receive
    with pytest.raises(TransferFailed):
        await send
    with pytest.raises(TransferFailed):
        await recv_one(here, next(_tags), 10)
    assert here.closed
    assert there.closed


async def test_closing_fails_the_own_pending_receives(pair: Pair) -> None:
    here, _ = await pair.connect()
    receive = asyncio.create_task(recv_one(here, next(_tags), 100))
    await asyncio.sleep(0)
    await here.close()
    with pytest.raises(TransferFailed):
        await receive
    with pytest.raises(TransferFailed):
        await here.send(next(_tags), memoryview(b"x"))


async def test_after_a_cancelled_receive_its_buffer_stays_untouched(pair: Pair) -> None:
    here, there = await pair.connect()
    gone, kept = next(_tags), next(_tags)
    buffer = bytearray(100_000)
    receive = asyncio.create_task(there.recv(gone, memoryview(buffer)))
    await asyncio.sleep(0.02)
    receive.cancel()
    with pytest.raises(asyncio.CancelledError):
        await receive
    late = asyncio.create_task(send_all(here, {gone: b"\xff" * len(buffer)}))
    if not there.closed:
        later = asyncio.create_task(send_all(here, {kept: b"k" * 10}))
        assert await recv_one(there, kept, 10) == b"k" * 10
        await later
    assert not any(buffer)
    late.cancel()
    await asyncio.gather(late, return_exceptions=True)


@pytest.mark.parametrize("pause_ms", [0, 1, 2, 4, 8])
async def test_a_receive_cancelled_inside_its_message_never_writes_afterwards(pair: Pair, pause_ms: int) -> None:
    here, there = await pair.connect()
    tag = next(_tags)
    buffer = bytearray(16 * 2**20)
    receive = asyncio.create_task(there.recv(tag, memoryview(buffer)))
    late = asyncio.create_task(send_all(here, {tag: b"\xff" * len(buffer)}))
    await asyncio.sleep(pause_ms / 1000)
    receive.cancel()
    await asyncio.gather(receive, return_exceptions=True)
    seen = bytes(buffer)
    for _ in range(2000):  # turns of the loop in which a late write would land
        await asyncio.sleep(0)
    assert buffer == seen
    late.cancel()
    await asyncio.gather(late, return_exceptions=True)


async def test_a_tag_cannot_be_posted_twice(pair: Pair) -> None:
    here, there = await pair.connect()
    tag = next(_tags)
    receive = asyncio.create_task(recv_one(there, tag, 10))
    await asyncio.sleep(0)
    with pytest.raises(TransferFailed):
        await recv_one(there, tag, 10)
    await send_all(here, {tag: b"0123456789"})
    assert await receive == b"0123456789"


@pytest.mark.parametrize(
    "buffer",
    [memoryview(bytearray(64))[::2], memoryview(bytearray(64)).cast("I"), memoryview(bytearray(0))],
    ids=["strided", "typed", "empty"],
)
async def test_buffers_that_are_not_plain_bytes_are_refused(pair: Pair, buffer: memoryview) -> None:
    here, there = await pair.connect()
    with pytest.raises(TransferFailed):
        await here.send(next(_tags), buffer)
    with pytest.raises(TransferFailed):
        await there.recv(next(_tags), buffer)


async def test_a_receive_into_read_only_bytes_is_refused(pair: Pair) -> None:
    _, there = await pair.connect()
    with pytest.raises(TransferFailed):
        await there.recv(next(_tags), memoryview(b"immutable"))


async def test_connecting_to_nothing_fails_within_its_deadline(pair: Pair) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{unused.getsockname()[1]}"
        started_s = time.monotonic()
        with pytest.raises(TransferFailed):
            await pair.connecting.connect(nobody, b"h" * 16, 1.0)
    assert time.monotonic() - started_s < 1.0 + SLACK_S


async def test_connecting_to_a_listener_that_never_answers_is_bounded(pair: Pair) -> None:
    if pair.name == "inproc":
        return
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(1)
        started_s = time.monotonic()
        try:
            connection = await pair.connecting.connect(f"127.0.0.1:{mute.getsockname()[1]}", b"h" * 16, 1.0)
        except TransferFailed:
            pass
        else:
            await connection.close()  # tcp: the kernel accepts; the hand-off's Begin is what is never answered
        assert time.monotonic() - started_s < 1.0 + SLACK_S


@pytest.mark.parametrize("junk", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x00" * 20, secrets.token_bytes(5000)])
async def test_a_peer_that_speaks_something_else_disturbs_nobody(pair: Pair, junk: bytes) -> None:
    here, there = await pair.connect()
    if pair.name != "inproc":
        host, port = pair.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(junk)
        await writer.drain()
        if junk and pair.name == "tcp":
            async with asyncio.timeout(30):
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
        writer.close()
    tag = next(_tags)
    sending = asyncio.create_task(send_all(here, {tag: b"fine" * 100}))
    assert await recv_one(there, tag, 400) == b"fine" * 100
    await sending


@pytest.mark.parametrize("name", TRANSPORTS)
async def test_the_loop_that_the_workers_run_on_carries_messages_too(name: str) -> None:
    async def carry() -> bytes:
        pair = Pair(open_named(name), open_named(name))
        await pair.open()
        here, there = await pair.connect()
        tag = next(_tags)
        sending = asyncio.create_task(send_all(here, {tag: b"carried" * 10_000}))
        received = await recv_one(there, tag, 70_000)
        await sending
        await pair.connecting.close()
        await pair.listening.close()
        return received

    assert await asyncio.to_thread(uvloop.run, carry()) == b"carried" * 10_000


class TestTcpFrames:
    """What only the tcp transport has: a frame format that a peer can get wrong."""

    @pytest.mark.parametrize(
        "frame",
        [
            struct.pack("<4sQQ", b"XXXX", 1, 10),
            struct.pack("<4sQQ", b"PDF1", 1, 0),
            struct.pack("<4sQQ", b"PDF1", 1, 2**40),
        ],
        ids=["magic", "empty", "huge"],
    )
    async def test_a_malformed_frame_closes_that_connection_only(self, frame: bytes) -> None:
        pair = Pair(open_named("tcp"), open_named("tcp"))
        await pair.open()
        here, there = await pair.connect()
        bad = await self._raw_connection(pair)
        receive = asyncio.create_task(recv_one(bad[1], next(_tags), 10))
        await asyncio.get_running_loop().sock_sendall(bad[0], frame)
        with pytest.raises(TransferFailed, match="Malformed"):
            await receive
        tag = next(_tags)
        sending = asyncio.create_task(send_all(here, {tag: b"good"}))
        assert await recv_one(there, tag, 4) == b"good"
        await sending
        bad[0].close()
        await pair.connecting.close()
        await pair.listening.close()

    async def test_a_message_that_nobody_posts_a_receive_for_closes_after_a_deadline(self) -> None:
        quick = TransferConfig(connect_s=0.2)
        pair = Pair(open_transport("tcp", quick, "127.0.0.1"), open_named("tcp"))
        await pair.open()
        here, there = await pair.connect()
        with pytest.raises(TransferFailed):
            await send_all(here, {next(_tags): random_bytes(64 * 2**20)})
        assert there.closed
        await pair.connecting.close()
        await pair.listening.close()

    @staticmethod
    async def _raw_connection(pair: Pair) -> tuple[socket.socket, Connection]:
        loop = asyncio.get_running_loop()
        host, port = pair.address.split(":")
        sock = socket.socket()
        sock.setblocking(False)
        await loop.sock_connect(sock, (host, int(port)))
        hello = secrets.token_bytes(16)
        accepted: asyncio.Future[Connection] = loop.create_future()
        pair._accepted[hello] = accepted
        await loop.sock_sendall(sock, hello + b"PDKV" + struct.pack("<16sBB", secrets.token_bytes(16), 0, 1))
        async with asyncio.timeout(30):
            return sock, await accepted


async def test_auto_is_a_real_transport_and_an_unknown_name_is_refused() -> None:
    assert resolve("auto") in ("ucx", "tcp")
    assert resolve("tcp") == resolve("auto", "tcp") == "tcp"
    with pytest.raises(ConfigInvalid, match="carrier-pigeon"):
        open_transport("carrier-pigeon", CONFIG, "127.0.0.1")


async def test_a_pair_that_moves_nothing_leaves_the_core_alone(pair: Pair) -> None:
    """CPU time of the process in a stretch of wall time: a loop that turns on and on takes all of it. Other work on the machine only
    makes the share smaller; that of other tests' threads in this process ends, hence a few stretches."""
    here, there = await pair.connect()
    for one, other in ((here, there), (there, here)):
        tag = next(_tags)
        sending = asyncio.create_task(send_all(one, {tag: random_bytes(100_000)}))
        assert await recv_one(other, tag, 100_000) == random_bytes(100_000)
        await sending
    shares: list[float] = []
    while len(shares) < 10 and (not shares or shares[-1] > IDLE_SHARE):
        started_s, used_s = time.monotonic(), time.process_time()
        await asyncio.sleep(0.3)
        shares.append((time.process_time() - used_s) / (time.monotonic() - started_s))
    assert shares[-1] <= IDLE_SHARE, shares
