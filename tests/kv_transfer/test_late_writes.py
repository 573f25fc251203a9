"""Bytes that come late, for blocks that were taken from their hand-off and given to another: nothing of them is ever seen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import grpc
import pytest
import pytest_asyncio

from kv_transfer.leases import DispatchKey
from kv_transfer.transports import open_transport
from pdserve.errors import Cancelled, InternalError, TransferFailed
from pdserve.v1 import handoff_pb2
from service_kit.config import TransferConfig
from tests.kv_transfer.peer_by_hand import Peer
from tests.kv_transfer.rig import Rig, block_bytes_of, eventually, open_rig

# One loop for the module: UCX keeps one context per process.
pytestmark = pytest.mark.asyncio(loop_scope="module")

BLOCKS, TOKENS, LAYERS = (5, 6), 32, 4  # of A, and then of B
OF_B = (1, 2)  # where B's bytes come from; A's come from others
A, B = DispatchKey(1, 1), DispatchKey(2, 1)


@pytest.fixture
def heartbeat_s() -> float:
    """Two of them is how long a fence waits for the writer's last word: here for one that says it, on a busy machine."""
    return 5.0


@pytest_asyncio.fixture(loop_scope="module", params=["ucx", "tcp", "inproc"])
async def rig(request: pytest.FixtureRequest, heartbeat_s: float) -> AsyncIterator[Rig]:
    name = str(request.param)
    config = TransferConfig(heartbeat_s=heartbeat_s, heartbeat_misses=50, lease_s=30.0, connect_s=30.0)
    sending, receiving = (open_transport(name, config, "127.0.0.1") for _ in range(2))
    async with open_rig(sending, receiving, config=config) as made:
        made.sending = sending
        yield made
    await sending.close()
    await receiving.close()


@pytest_asyncio.fixture(loop_scope="module")
async def late(rig: Rig) -> AsyncIterator[Peer]:
    """A: accepted, and two layers announced, the first of which it delivered."""
    peer = Peer(rig, rig.reserve(BLOCKS, TOKENS, key=1), TOKENS)
    await peer.begin()
    await peer.say(segment=peer.segment(index=0, layer=0))
    await peer.send(peer.segment(index=0, layer=0))
    await peer.hear("segment_done")
    yield peer
    await peer.close()


async def hand_off_b_around(rig: Rig, late_bytes: asyncio.Task[None] | None) -> None:
    """B's hand-off into A's blocks: half of it, then A's late bytes, then the rest. Every byte is B's in the end."""
    handoff = rig.start(rig.reserve(BLOCKS, TOKENS, key=2), TOKENS)
    handoff.source_blocks(OF_B)
    for layer in (0, 1):
        handoff.kv_ready(layer, 0, 2)
    await eventually(
        lambda: all(block_bytes_of(rig.target, 1, 5 + at) == block_bytes_of(rig.source, 1, 1 + at) for at in (0, 1))
    )
    if late_bytes is not None:
        await asyncio.wait([late_bytes], timeout=0.2)  # a transport may hold on to what nobody receives
    for layer in (2, 3):
        handoff.kv_ready(layer, 0, 2)
    handoff.finish([(0, 7)])
    assert (await handoff.outcome()).error is None
    assert (await rig.destination.ending(B)).first_tokens == ((0, 7),)
    for layer in range(LAYERS):
        for here, there in zip(OF_B, BLOCKS, strict=True):
            assert block_bytes_of(rig.target, layer, there) == block_bytes_of(rig.source, layer, here)


async def try_to_send(peer: Peer, segment: handoff_pb2.Segment) -> None:
    with suppress(TransferFailed, TimeoutError):
        await peer.send(segment)


async def test_blocks_whose_bytes_may_still_come_are_given_to_nobody_and_to_b_once_they_came(
    rig: Rig, late: Peer
) -> None:
    await late.say(segment=late.segment(index=1, layer=1))
    await eventually(lambda: rig.receiver._held[A][0]._segments.posted == 1)
    rig.receiver.revoke(A, Cancelled("the client went away"))
    with pytest.raises(InternalError, match="while a writer"):
        rig.reserve(BLOCKS, TOKENS, key=2)
    await late.send(late.segment(index=1, layer=1))
    await late.say(abort=handoff_pb2.Abort())
    assert isinstance((await rig.destination.ending(A)).error, Cancelled)
    await hand_off_b_around(rig, None)


@pytest.mark.parametrize("heartbeat_s", [0.2])
async def test_bytes_that_come_after_their_connection_was_closed_do_not_reach_b(
    rig: Rig, late: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """A says nothing any more: its blocks are free again once its connection is closed, which the log tells."""
    await late.say(segment=late.segment(index=1, layer=1))
    await eventually(lambda: rig.receiver._held[A][0]._segments.posted == 1)
    rig.receiver.revoke(A, Cancelled("the client went away"))
    assert isinstance((await rig.destination.ending(A)).error, Cancelled)
    assert "handoff_writer_cut_off" in caplog.messages
    sending = asyncio.create_task(try_to_send(late, late.segment(index=1, layer=1)))
    await hand_off_b_around(rig, sending)
    sending.cancel()


async def test_bytes_that_come_unannounced_after_the_abort_do_not_reach_b(rig: Rig, late: Peer) -> None:
    """A's connection stays open, and its tags were granted for these very blocks."""
    await late.say(abort=handoff_pb2.Abort(reason=Cancelled.reason, message="the client went away"))
    assert isinstance((await rig.destination.ending(A)).error, Cancelled)
    assert late.connection is not None
    assert not late.connection.closed
    sending = asyncio.create_task(try_to_send(late, late.segment(index=2, layer=1)))
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await late.say(segment=late.segment(index=2, layer=1))
    await hand_off_b_around(rig, sending)
    sending.cancel()
