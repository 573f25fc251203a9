"""Hand-offs between two arenas over real gRPC, on every transport."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from kv_transfer.leases import DispatchKey
from kv_transfer.sender import Handoff
from kv_transfer.transports import open_transport
from pdserve.errors import Cancelled, InternalError, LayoutMismatch, LeaseExpired, TransferFailed
from service_kit.config import TransferConfig
from tests.kv_transfer.rig import (
    IDENTITY,
    Geometry,
    Rig,
    block_bytes_of,
    eventually,
    make_side,
    open_rig,
)

# One loop for the module: UCX keeps one context per process.
pytestmark = pytest.mark.asyncio(loop_scope="module")

# Nobody falls silent here: who says nothing for seconds has had no turn on a busy machine.
CONFIG = TransferConfig(heartbeat_s=0.2, heartbeat_misses=50, lease_s=3.0, connect_s=10.0, max_message_bytes=8192)
SLACK_S = 5.0  # of a busy machine


@pytest_asyncio.fixture(loop_scope="module", params=["ucx", "tcp", "inproc"])
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    name = str(request.param)
    sending, receiving = (open_transport(name, CONFIG, "127.0.0.1") for _ in range(2))
    async with open_rig(sending, receiving, config=CONFIG) as made:
        yield made
    await sending.close()
    await receiving.close()


def announce_all(handoff: Handoff, blocks: int, layers: int = 4) -> None:
    for layer in range(layers):
        handoff.kv_ready(layer, 0, blocks)


def assert_equal_blocks(rig: Rig, source: tuple[int, ...], target: tuple[int, ...], layers: int = 4) -> None:
    for layer in range(layers):
        for here, there in zip(source, target, strict=True):
            assert block_bytes_of(rig.source, layer, here) == block_bytes_of(rig.target, layer, there)


async def test_all_blocks_arrive_and_the_request_is_activated(rig: Rig) -> None:
    source, target = (1, 2, 3, 9, 10, 20), (30, 31, 40, 41, 42, 50)
    handoff = rig.start(rig.reserve(target, 90), 90)
    handoff.source_blocks(source)
    announce_all(handoff, 6)
    handoff.finish([(0, 77), (2, 78)])
    outcome = await handoff.outcome()
    ending = await rig.destination.ending(DispatchKey(1, 1))
    assert outcome.error is None
    assert outcome.activated
    assert outcome.bytes == 4 * 6 * 2048
    assert outcome.transfer_us > 0
    assert outcome.exposed_us > 0
    assert ending.first_tokens == ((0, 77), (2, 78))
    assert ending.report is not None
    assert (ending.report.bytes, ending.report.segments) == (outcome.bytes, outcome.segments)
    assert_equal_blocks(rig, source, target)
    assert rig.receiver.held == 0


async def test_a_layer_leaves_as_soon_as_it_exists(rig: Rig) -> None:
    handoff = rig.start(rig.reserve((5, 6), 32), 32)
    handoff.source_blocks((1, 2))
    handoff.kv_ready(0, 0, 2)
    await eventually(lambda: block_bytes_of(rig.target, 0, 6) == block_bytes_of(rig.source, 0, 2))
    assert not any(block_bytes_of(rig.target, 1, 5))
    for layer in (1, 2, 3):
        handoff.kv_ready(layer, 0, 1)
        handoff.kv_ready(layer, 1, 1)
    handoff.finish([(0, 1)])
    assert (await handoff.outcome()).error is None
    assert_equal_blocks(rig, (1, 2), (5, 6))


async def test_layers_of_a_chunk_leave_after_a_while_though_the_prompt_goes_on(rig: Rig) -> None:
    handoff = rig.start(rig.reserve((5, 6), 32), 32)
    handoff.source_blocks((1, 2))
    handoff.kv_ready(0, 0, 1)
    await eventually(lambda: block_bytes_of(rig.target, 0, 5) == block_bytes_of(rig.source, 0, 1))
    handoff.abort(None)
    await handoff.outcome()


@pytest.fixture
def gathers_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for the last chunk does not leave before it."""
    monkeypatch.setattr("kv_transfer.pusher.GATHER_S", 3600.0)


async def linked(rig: Rig, layers: int) -> Handoff:
    """Of two blocks, 1 and 2 here, 5 and 6 there. So many layers of the first one exist, and could leave."""
    handoff = rig.start(rig.reserve((5, 6), 32), 32)
    handoff.source_blocks((1, 2))
    announce_all(handoff, 1, layers)
    await eventually(lambda: handoff._pusher._link is not None)
    return handoff


@pytest.mark.usefixtures("gathers_for_ever")
async def test_layers_of_a_chunk_wait_for_each_other_and_leave_with_the_last_chunk(rig: Rig) -> None:
    handoff = await linked(rig, layers=4)
    assert handoff._pusher.segments == 0
    handoff.kv_ready(0, 1, 1)
    await eventually(lambda: block_bytes_of(rig.target, 0, 6) == block_bytes_of(rig.source, 0, 2))
    for layer in (1, 2, 3):
        handoff.kv_ready(layer, 1, 1)
    handoff.finish([(0, 1)])
    assert (await handoff.outcome()).error is None
    assert_equal_blocks(rig, (1, 2), (5, 6))


@pytest.mark.usefixtures("gathers_for_ever")
async def test_a_prompt_that_ends_early_does_not_wait_for_what_cannot_come(rig: Rig) -> None:
    handoff = await linked(rig, layers=1)
    handoff.finish([(0, 1)])
    assert isinstance((await handoff.outcome()).error, InternalError)


async def test_a_prompt_that_ends_after_its_kv_has_left_is_committed_in_the_same_turn(rig: Rig) -> None:
    handoff = rig.start(rig.reserve((5, 6), 32), 32)
    handoff.source_blocks((1, 2))
    announce_all(handoff, 2)
    await eventually(lambda: block_bytes_of(rig.target, 3, 6) == block_bytes_of(rig.source, 3, 2))
    assert not handoff._pusher._committed
    handoff.finish([(0, 1)])
    assert handoff._pusher._committed
    outcome = await handoff.outcome()
    assert (outcome.error, outcome.activated) == (None, True)
    assert (await rig.destination.ending(DispatchKey(1, 1))).first_tokens == ((0, 1),)


async def test_messages_are_ranges_contiguous_on_both_sides_and_bounded(rig: Rig) -> None:
    # Runs: source 0-5 | 10-15; target 20-23 | 30-37. At most 4 blocks (8192 bytes) a message: 4, 2, 4, 2 per layer.
    source, target = (*range(6), *range(10, 16)), (*range(20, 24), *range(30, 38))
    handoff = rig.start(rig.reserve(target, 12 * 16), 12 * 16)
    handoff.source_blocks(source)
    announce_all(handoff, 12)
    handoff.finish([])
    outcome = await handoff.outcome()
    assert outcome.error is None
    assert outcome.segments == 4 * 4
    assert_equal_blocks(rig, source, target)


async def test_cached_blocks_are_neither_sent_nor_written(rig: Rig) -> None:
    handoff = rig.start(rig.reserve((5, 6, 7), 40, cached_tokens=32), 40)
    handoff.source_blocks((1, 2, 3))
    announce_all(handoff, 3)
    handoff.finish([(0, 1)])
    outcome = await handoff.outcome()
    assert outcome.bytes == 4 * 2048
    assert not any(block_bytes_of(rig.target, 0, 5))
    assert_equal_blocks(rig, (3,), (7,))


async def test_many_handoffs_share_one_connection(rig: Rig) -> None:
    handoffs = []
    for key in range(12):
        handoff = rig.start(rig.reserve((key * 4, key * 4 + 1), 32, key=key), 32)
        handoff.source_blocks((key * 4 + 2, key * 4 + 3))
        announce_all(handoff, 2)
        handoff.finish([(0, key)])
        handoffs.append(handoff)
    outcomes = await asyncio.gather(*(handoff.outcome() for handoff in handoffs))
    assert [outcome.error for outcome in outcomes] == [None] * 12
    for key in range(12):
        assert_equal_blocks(rig, (key * 4 + 2, key * 4 + 3), (key * 4, key * 4 + 1))


async def test_a_prompt_that_waits_longer_than_the_lease_keeps_its_reservation(rig: Rig) -> None:
    handoff = rig.start(rig.reserve((5,), 16), 16)
    await asyncio.sleep(CONFIG.lease_s * 1.3)  # virtual time cannot cross gRPC
    handoff.source_blocks((1,))
    announce_all(handoff, 1)
    handoff.finish([(0, 1)])
    assert (await handoff.outcome()).error is None


async def test_nothing_to_hand_off_gives_the_blocks_back_without_an_error(rig: Rig) -> None:
    handoff = rig.start(rig.reserve((5, 6), 32), 32)
    handoff.source_blocks((1, 2))
    handoff.kv_ready(0, 0, 2)
    await eventually(lambda: any(block_bytes_of(rig.target, 0, 5)))
    handoff.abort(None)
    outcome = await handoff.outcome()
    assert outcome.error is None
    assert not outcome.activated
    assert (await rig.destination.ending(DispatchKey(1, 1))).error is None
    assert rig.receiver.held == 0


@pytest.mark.parametrize("moment", ["at once", "begun", "in the middle"])
async def test_an_abort_ends_both_sides_with_its_reason(rig: Rig, moment: str) -> None:
    handoff = rig.start(rig.reserve(tuple(range(40)), 640), 640)
    if moment == "begun":
        await asyncio.sleep(0.05)
    if moment == "in the middle":
        handoff.source_blocks(tuple(range(40)))
        announce_all(handoff, 40)
        await eventually(lambda: any(block_bytes_of(rig.target, 0, 0)))
    handoff.abort(Cancelled("the client went away"))
    outcome = await handoff.outcome()
    assert isinstance(outcome.error, Cancelled)
    ending = await rig.destination.ending(DispatchKey(1, 1))
    # Aborted before Begin: the reservation expires by itself.
    assert isinstance(ending.error, Cancelled if moment == "in the middle" else (Cancelled, LeaseExpired))
    await check_alive(rig)


@pytest.mark.parametrize("moment", ["granted", "begun", "in the middle"])
async def test_revoke_fences_the_writer_before_it_reports(rig: Rig, moment: str) -> None:
    key = DispatchKey(1, 1)
    target = tuple(range(40))
    grant = rig.reserve(target, 640)
    handoff = rig.start(grant, 640) if moment != "granted" else None
    if handoff is not None:
        await eventually(lambda: handoff._accepted.done())
    if moment == "in the middle":
        assert handoff is not None
        handoff.source_blocks(tuple(range(40)))
        announce_all(handoff, 40)
        await eventually(lambda: any(block_bytes_of(rig.target, 0, 0)))
    rig.receiver.revoke(key, Cancelled("the client went away"))
    ending = await rig.destination.ending(key)
    assert isinstance(ending.error, Cancelled)
    after = [bytes(rig.target.arena.blocks(layer, 0, 40)) for layer in range(4)]
    if handoff is not None:
        assert isinstance((await handoff.outcome()).error, Cancelled)
        await asyncio.sleep(0.1)  # time in which late bytes would land
    assert after == [bytes(rig.target.arena.blocks(layer, 0, 40)) for layer in range(4)]
    if handoff is None:
        late = rig.start(grant, 640)
        assert isinstance((await late.outcome()).error, LeaseExpired)
    await check_alive(rig)


async def check_alive(rig: Rig) -> None:
    """The next hand-off works."""
    handoff = rig.start(rig.reserve((60, 61), 32, key=99), 32)
    handoff.source_blocks((62, 63))
    announce_all(handoff, 2)
    handoff.finish([(0, 5)])
    outcome = await handoff.outcome()
    assert outcome.error is None
    assert_equal_blocks(rig, (62, 63), (60, 61))


async def test_a_reservation_that_is_never_begun_expires(rig: Rig) -> None:
    rig.reserve((5, 6), 32)
    ending = await rig.destination.ending(DispatchKey(1, 1), deadline_s=CONFIG.lease_s + SLACK_S)
    assert isinstance(ending.error, LeaseExpired)
    assert rig.receiver.counters.expired_leases == 1
    rig.reserve((5, 6), 32, key=2)  # the blocks are free again
    rig.receiver.revoke(DispatchKey(2, 1), Cancelled("done"))


async def test_blocks_with_a_live_writer_cannot_be_reserved_again(rig: Rig) -> None:
    rig.reserve((5, 6), 32)
    with pytest.raises(InternalError, match="block 6"):
        rig.reserve((6, 7), 32, key=2)
    with pytest.raises(InternalError, match="holds a reservation"):
        rig.reserve((8, 9), 32)
    rig.receiver.revoke(DispatchKey(1, 1), Cancelled("done"))
    rig.reserve((6, 7), 32, key=2)
    rig.receiver.revoke(DispatchKey(2, 1), Cancelled("done"))


async def test_another_model_is_refused_with_both_names(rig: Rig) -> None:
    grant = rig.reserve((5, 6), 32)
    grant.identity.model = "other"
    outcome = await rig.start(grant, 32).outcome()
    assert isinstance(outcome.error, LayoutMismatch)
    assert "'tiny'" in outcome.error.message
    assert "'other'" in outcome.error.message
    rig.receiver.revoke(DispatchKey(1, 1), outcome.error)


async def test_another_page_size_is_refused_with_both_sizes(rig: Rig) -> None:
    grant = rig.reserve((5, 6), 32)
    grant.layout[0].page_tokens = 32
    outcome = await rig.start(grant, 32).outcome()
    assert isinstance(outcome.error, LayoutMismatch)
    assert "page_tokens is 16 at the source and 32 at the destination" in outcome.error.message
    rig.receiver.revoke(DispatchKey(1, 1), outcome.error)


async def test_commit_without_all_blocks_is_our_bug_and_fails(rig: Rig) -> None:
    handoff = rig.start(rig.reserve((5, 6), 32), 32)
    handoff.source_blocks((1, 2))
    handoff.kv_ready(0, 0, 2)
    handoff.finish([(0, 1)])
    outcome = await handoff.outcome()
    assert isinstance(outcome.error, InternalError)
    assert "6 KV blocks" in outcome.error.message
    assert (await rig.destination.ending(DispatchKey(1, 1))).error is not None


async def test_a_decode_worker_that_is_not_there_fails_in_time(rig: Rig) -> None:
    grant = rig.reserve((5, 6), 32)
    rig.address = "127.0.0.1:1"
    started_s = time.monotonic()
    outcome = await rig.start(grant, 32).outcome()
    assert isinstance(outcome.error, TransferFailed)
    assert time.monotonic() - started_s < CONFIG.connect_s + SLACK_S
    rig.receiver.revoke(DispatchKey(1, 1), outcome.error)


async def test_a_kv_endpoint_that_is_not_there_fails_in_time(rig: Rig) -> None:
    grant = rig.reserve((5, 6), 32)
    grant.endpoint.address = "127.0.0.1:1"
    started_s = time.monotonic()
    outcome = await rig.start(grant, 32).outcome()
    assert isinstance(outcome.error, TransferFailed)
    assert time.monotonic() - started_s < CONFIG.connect_s + SLACK_S
    rig.receiver.revoke(DispatchKey(1, 1), outcome.error)


async def test_a_sender_that_is_closed_ends_its_handoffs(rig: Rig) -> None:
    handoff = rig.start(rig.reserve((5, 6), 32), 32)
    await eventually(lambda: handoff._accepted.done())
    await rig.sender.close()
    assert isinstance((await handoff.outcome()).error, TransferFailed)
    assert isinstance((await rig.destination.ending(DispatchKey(1, 1))).error, TransferFailed)


async def test_unequal_geometry_is_refused_at_begin_too() -> None:
    sending, receiving = (open_transport("tcp", CONFIG, "127.0.0.1") for _ in range(2))
    async with open_rig(sending, receiving, config=CONFIG) as rig:
        other = make_side("p1", Geometry(block_bytes=4096), identity=IDENTITY)
        grant = rig.reserve((5, 6), 32)
        grant.layout[0].block_bytes = 4096  # so that the sender's own check passes
        rig.sender._side = other
        outcome = await rig.start(grant, 32).outcome()
        assert isinstance(outcome.error, LayoutMismatch)
        assert "4096" in outcome.error.message
        assert "2048" in outcome.error.message
        assert isinstance((await rig.destination.ending(DispatchKey(1, 1))).error, LayoutMismatch)
    await sending.close()
    await receiving.close()
