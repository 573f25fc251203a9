"""Peers that lie, repeat themselves, come late or fall silent: one stream suffers, nothing is activated wrongly."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import grpc
import pytest

from kv_transfer.leases import DispatchKey
from kv_transfer.sender import HandoffOrder
from kv_transfer.transports import open_transport
from kv_transfer.transports.inproc import InprocTransport
from pdserve.errors import KvCorrupt, LeaseExpired, TransferFailed
from pdserve.v1 import handoff_pb2, handoff_pb2_grpc
from service_kit.config import TransferConfig
from tests.kv_transfer.peer_by_hand import BLOCK_BYTES, Peer
from tests.kv_transfer.rig import Rig, block_bytes_of, eventually, open_rig

PATIENT = TransferConfig(
    heartbeat_s=0.2, heartbeat_misses=50, lease_s=30.0, connect_s=30.0
)  # for peers on a busy machine
CONFIG = TransferConfig(heartbeat_s=0.2, lease_s=2.0, connect_s=0.5)
IMPATIENT = pytest.mark.parametrize("config", [CONFIG])  # for what is to end by itself
KEY = DispatchKey(1, 1)
SLACK_S = 5.0  # of a busy machine


@pytest.fixture
def config() -> TransferConfig:
    return PATIENT


@pytest.fixture
async def rig(config: TransferConfig) -> AsyncIterator[Rig]:
    sending, receiving = InprocTransport(), InprocTransport()
    async with open_rig(sending, receiving, config=config) as made:
        made.sending = sending
        yield made
    await sending.close()
    await receiving.close()


@pytest.fixture
async def peer(rig: Rig) -> AsyncIterator[Peer]:
    made = Peer(rig, rig.reserve((5, 6), 32))
    yield made
    await made.close()


async def refused(peer: Peer) -> str:
    return (await peer.hear("refused")).refused.reason


async def failed_with(peer: Peer, kind: type[Exception]) -> None:
    ending = await peer.rig.destination.ending(KEY)
    assert isinstance(ending.error, kind), ending
    assert ending.first_tokens is None
    assert peer.rig.receiver.held == 0


async def test_the_hand_written_peer_is_served_when_it_behaves(peer: Peer) -> None:
    await peer.begin()
    await peer.deliver_all()
    await peer.say(commit=handoff_pb2.Commit(segment_count=4, byte_count=4 * 2 * BLOCK_BYTES))
    await peer.hear("activated")
    assert (await peer.rig.destination.ending(KEY)).error is None


async def test_a_wrong_ticket_is_refused_and_leaves_the_reservation(peer: Peer) -> None:
    await peer.connect()
    begin = peer.begin_message()
    begin.ticket = b"\x00" * 16
    await peer.say(begin=begin)
    assert await refused(peer) == "permission_error"
    assert peer.rig.receiver.held == 1
    honest = Peer(peer.rig, peer.grant)
    await honest.begin()
    await honest.close()


@pytest.mark.parametrize("attempt", [0, 2, 2**31])
async def test_another_attempt_is_refused(peer: Peer, attempt: int) -> None:
    await peer.connect()
    begin = peer.begin_message()
    begin.dispatch.attempt = attempt
    await peer.say(begin=begin)
    assert await refused(peer) == "lease_expired"
    assert peer.rig.receiver.held == 1


async def test_a_ticket_works_once(peer: Peer) -> None:
    await peer.begin()
    second = Peer(peer.rig, peer.grant)
    await second.connect()
    await second.say(begin=second.begin_message())
    assert await refused(second) == "lease_expired"
    await second.close()
    await peer.deliver_all()
    await peer.say(commit=handoff_pb2.Commit(segment_count=4, byte_count=4 * 2 * BLOCK_BYTES))
    await peer.hear("activated")
    third = Peer(peer.rig, peer.grant)
    await third.connect()
    await third.say(begin=third.begin_message())
    assert await refused(third) == "lease_expired"
    await third.close()


async def test_a_stream_that_does_not_begin_is_refused(peer: Peer) -> None:
    await peer.say(heartbeat=handoff_pb2.Heartbeat())
    assert await refused(peer) == "transfer_failed"
    assert peer.rig.receiver.held == 1


@IMPATIENT
async def test_a_stream_that_says_nothing_is_ended(peer: Peer) -> None:
    started_s = time.monotonic()
    assert await refused(peer) == "transfer_failed"
    assert time.monotonic() - started_s < CONFIG.connect_s + SLACK_S


@IMPATIENT
async def test_a_data_connection_that_never_comes_fails_the_handoff(peer: Peer) -> None:
    await peer.say(begin=peer.begin_message())
    assert await refused(peer) == "transfer_failed"
    await failed_with(peer, TransferFailed)


@IMPATIENT
async def test_a_data_connection_that_no_begin_names_is_closed(peer: Peer) -> None:
    await peer.connect()
    assert peer.connection is not None
    connection = peer.connection
    await eventually(lambda: connection.closed, CONFIG.connect_s + SLACK_S)


async def test_a_data_connection_may_come_after_begin(peer: Peer) -> None:
    await peer.say(begin=peer.begin_message())
    await asyncio.sleep(0.1)
    await peer.connect()
    await peer.hear("accepted")


async def test_several_begins_may_wait_for_their_one_connection(rig: Rig) -> None:
    peers = [Peer(rig, rig.reserve((4 * key, 4 * key + 1), 32, key=key)) for key in (1, 2, 3)]
    for key, peer in enumerate(peers, start=1):
        peer.hello = peers[0].hello
        begin = peer.begin_message()
        begin.dispatch.request_key = key
        await peer.say(begin=begin)
    await asyncio.sleep(0.1)
    await peers[0].connect()
    for peer in peers:
        await peer.hear("accepted")
        await peer.close()


@pytest.mark.parametrize(
    "change",
    [
        {"tag": 7},
        {"layer": 4},
        {"layer": 2**31},
        {"first_block": 1},
        {"first_block": 2**32 - 1},
        {"block_count": 0},
        {"block_count": 2**32 - 1},
        {"length": BLOCK_BYTES},
        {"length": 2**40},
        {"checksums": []},
        {"checksums": [b"short", b"short"]},
        {"checksums": [b"x" * 16] * 5000},
    ],
    ids=lambda change: "-".join(map(str, change)),
)
async def test_a_segment_that_breaks_a_rule_ends_the_session(peer: Peer, change: dict[str, object]) -> None:
    await peer.begin()
    segment = peer.segment()
    for name, value in change.items():
        if isinstance(value, list):
            del segment.checksums[:]
            segment.checksums.extend(value)
        else:
            setattr(segment, name, value)
    await peer.say(segment=segment)
    assert await refused(peer) == "transfer_failed"
    await failed_with(peer, TransferFailed)


async def test_a_range_that_is_not_adjacent_at_the_destination_is_refused(rig: Rig) -> None:
    peer = Peer(rig, rig.reserve((5, 9), 32))
    await peer.begin()
    await peer.say(segment=peer.segment())
    assert await refused(peer) == "transfer_failed"
    await failed_with(peer, TransferFailed)
    await peer.close()


@pytest.mark.parametrize("repeat", ["tag", "blocks", "both"])
async def test_a_repeated_segment_writes_nothing(peer: Peer, repeat: str) -> None:
    await peer.begin()
    first = peer.segment()
    await peer.say(segment=first)
    await peer.send(first)
    await peer.hear("segment_done")
    before = block_bytes_of(peer.rig.target, 0, 5)
    again = {
        "tag": peer.segment(index=0, layer=1),
        "blocks": peer.segment(index=1),
        "both": peer.segment(),
    }[repeat]
    await peer.say(segment=again)
    assert await refused(peer) == "transfer_failed"
    await failed_with(peer, TransferFailed)
    assert block_bytes_of(peer.rig.target, 0, 5) == before
    assert not any(block_bytes_of(peer.rig.target, 1, 5))


async def test_bytes_that_do_not_match_their_checksum_are_refused_and_counted(peer: Peer) -> None:
    await peer.begin()
    segment = peer.segment()
    segment.checksums[1] = b"\x00" * 16
    await peer.say(segment=segment)
    await peer.send(segment)
    assert await refused(peer) == "kv_corrupt"
    await peer.call.done_writing()
    await failed_with(peer, KvCorrupt)
    assert peer.rig.receiver.counters.verify_failures == 1


@pytest.mark.parametrize(
    ("segments", "size", "delivered"),
    [(4, 1, True), (5, 4 * 2 * BLOCK_BYTES, True), (0, 0, False)],
    ids=["wrong bytes", "wrong segments", "nothing sent"],
)
async def test_a_commit_that_does_not_add_up_activates_nothing(
    peer: Peer, segments: int, size: int, delivered: bool
) -> None:
    await peer.begin()
    if delivered:
        await peer.deliver_all()
    await peer.say(commit=handoff_pb2.Commit(segment_count=segments, byte_count=size))
    assert await refused(peer) == "transfer_failed"
    await failed_with(peer, TransferFailed)


async def test_commit_waits_for_the_bytes_that_were_announced(peer: Peer) -> None:
    await peer.begin()
    segments = [peer.segment(index=layer, layer=layer) for layer in range(4)]
    for segment in segments:
        await peer.say(segment=segment)
    await peer.say(commit=handoff_pb2.Commit(segment_count=4, byte_count=4 * 2 * BLOCK_BYTES))
    await asyncio.sleep(0.05)
    assert not peer.rig.destination.endings
    for segment in segments:
        await peer.send(segment)
    assert (await peer.rig.destination.ending(KEY)).error is None


async def test_messages_after_activation_have_no_effect(peer: Peer) -> None:
    await peer.begin()
    await peer.deliver_all()
    commit = handoff_pb2.Commit(segment_count=4, byte_count=4 * 2 * BLOCK_BYTES)
    heard = asyncio.create_task(peer.hear("activated"))
    await peer.say(commit=commit)
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the receiver may have hung up already
        await peer.say(commit=commit)
        await peer.say(segment=peer.segment(index=5))
    await heard
    assert (await peer.rig.destination.ending(KEY)).error is None


async def test_a_sender_that_leaves_without_commit_has_failed(peer: Peer) -> None:
    await peer.begin()
    await peer.call.done_writing()
    await failed_with(peer, TransferFailed)


async def test_a_sender_whose_stream_breaks_has_failed_at_once(peer: Peer) -> None:
    await peer.begin()
    segment = peer.segment()
    await peer.say(segment=segment)
    peer.call.cancel()
    await failed_with(peer, TransferFailed)
    ending = await peer.rig.destination.ending(KEY)
    assert "session was lost" in str(ending.error), "it took the heartbeats to notice"
    assert peer.connection is not None
    assert peer.connection.closed


@IMPATIENT
async def test_a_silent_sender_is_given_up_within_its_heartbeats(peer: Peer) -> None:
    started_s = time.monotonic()  # its beats are counted before it hears that it is accepted
    await peer.begin()
    await failed_with(peer, TransferFailed)
    silent_s = time.monotonic() - started_s
    assert CONFIG.heartbeat_s * CONFIG.heartbeat_misses * 0.9 < silent_s
    assert silent_s < CONFIG.heartbeat_s * CONFIG.heartbeat_misses + SLACK_S


@IMPATIENT
async def test_an_announced_message_that_never_comes_ends_with_the_lease(peer: Peer) -> None:
    await peer.begin()
    await peer.say(segment=peer.segment())
    ending = asyncio.create_task(peer.rig.destination.ending(KEY))
    while not ending.done():
        await peer.say(heartbeat=handoff_pb2.Heartbeat())
        await asyncio.sleep(0.1)
    assert isinstance((await ending).error, TransferFailed)


async def test_a_fence_that_the_sender_ignores_closes_its_endpoint(peer: Peer) -> None:
    await peer.begin()
    await peer.say(segment=peer.segment())
    await asyncio.sleep(0.05)
    peer.rig.receiver.revoke(KEY, LeaseExpired("enough"))
    assert await refused(peer) == "lease_expired"
    assert not peer.rig.destination.endings, "a receive is still posted"
    await failed_with(peer, LeaseExpired)
    assert peer.connection is not None
    assert peer.connection.closed


@pytest.mark.parametrize(
    "garbage", [b"\xff" * 50, b"\x0a\xff\xff\xff\xff\x0f", b"", b"\x12\x02\x08"], ids=["ff", "cut", "empty", "short"]
)
@pytest.mark.parametrize("begun", [False, True])
async def test_a_malformed_message_closes_that_stream_only(rig: Rig, garbage: bytes, begun: bool) -> None:
    good = Peer(rig, rig.reserve((5, 6), 32))
    await good.begin()
    channel = grpc.aio.insecure_channel(rig.address)
    raw = channel.stream_stream(
        "/pdserve.v1.HandoffService/Handoff", request_serializer=bytes, response_deserializer=bytes
    )(None)
    answers = aiter(raw)
    if begun:
        victim = Peer(rig, rig.reserve((20, 21), 32, key=2))
        await victim.connect()
        begin = victim.begin_message()
        begin.dispatch.request_key = 2
        await raw.write(handoff_pb2.HandoffRequest(begin=begin).SerializeToString())
        accepted = handoff_pb2.HandoffResponse.FromString(await anext(answers))
        assert accepted.WhichOneof("message") == "accepted"
    await raw.write(garbage)
    async with asyncio.timeout(30):
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for _ in answers:
                pass
    assert await raw.code() is not None
    if begun:
        assert isinstance((await rig.destination.ending(DispatchKey(2, 1))).error, TransferFailed)
    await good.deliver_all()
    await good.say(commit=handoff_pb2.Commit(segment_count=4, byte_count=4 * 2 * BLOCK_BYTES))
    await good.hear("activated")
    await good.close()
    await channel.close(None)


class MuteReceiver(handoff_pb2_grpc.HandoffServiceServicer):
    """Accepts and says nothing more."""

    async def Handoff(  # noqa: N802 (the name of the RPC)
        self,
        request_iterator: AsyncIterator[handoff_pb2.HandoffRequest],
        context: grpc.aio.ServicerContext[handoff_pb2.HandoffRequest, handoff_pb2.HandoffResponse],
    ) -> AsyncIterator[handoff_pb2.HandoffResponse]:
        await anext(request_iterator)
        yield handoff_pb2.HandoffResponse(accepted=handoff_pb2.Accepted(lease_ms=2000, runs=[2]))
        async for _ in request_iterator:
            pass


@IMPATIENT
async def test_a_silent_receiver_is_given_up_within_its_heartbeats(rig: Rig) -> None:
    server = grpc.aio.server()
    handoff_pb2_grpc.add_HandoffServiceServicer_to_server(MuteReceiver(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    handoff = rig.sender.start(HandoffOrder(KEY, rig.reserve((5, 6), 32), address, 32))
    handoff.source_blocks((1, 2))
    handoff.kv_ready(0, 0, 2)
    await eventually(lambda: handoff._accepted.done())
    started_s = time.monotonic()
    outcome = await handoff.outcome()
    assert isinstance(outcome.error, TransferFailed)
    limit_s = CONFIG.heartbeat_s * (CONFIG.heartbeat_misses + 2 + 2 + 1)  # + grace of the sends, of the last word
    assert time.monotonic() - started_s < limit_s + SLACK_S
    await server.stop(None)


async def test_two_transports_in_one_process_do_not_mix(rig: Rig) -> None:
    other = open_transport("tcp", CONFIG, "127.0.0.1")
    grant = rig.reserve((5, 6), 32)
    grant.endpoint.transport = "tcp"
    outcome = await rig.start(grant, 32).outcome()
    assert outcome.error is not None
    assert "inproc" in str(outcome.error)
    await other.close()
