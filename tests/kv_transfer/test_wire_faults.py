"""Seeded faults on the wire: whatever happens, either every byte is right or nothing is activated."""

from __future__ import annotations

import asyncio

import pytest

from kv_transfer.leases import DispatchKey
from kv_transfer.transports.inproc import FaultPlan, InprocTransport
from pdserve.errors import KvCorrupt
from service_kit.config import TransferConfig
from tests.kv_transfer.rig import Rig, block_bytes_of, open_rig

# Nobody is stopped here: whoever says nothing for seconds has had no turn on a busy machine.
CONFIG = TransferConfig(heartbeat_s=0.2, heartbeat_misses=100, lease_s=30.0, connect_s=30.0, max_message_bytes=4096)
HANDOFFS = 8
LAYERS = 4


async def push(rig: Rig, key: int) -> bool:
    """One hand-off of four blocks; True where it was activated, and then its bytes are right."""
    source, target = tuple(range(4 * key, 4 * key + 4)), tuple(range(32 + 4 * key, 36 + 4 * key))
    handoff = rig.start(rig.reserve(target, 64, key=key), 64)
    handoff.source_blocks(source)
    for layer in range(LAYERS):
        handoff.kv_ready(layer, 0, 4)
    handoff.finish([(0, key)])
    outcome = await handoff.outcome()
    ending = await rig.destination.ending(DispatchKey(key, 1))
    activated = ending.first_tokens is not None
    assert activated == (ending.error is None)
    assert not (outcome.activated and not activated)
    if activated:
        for layer in range(LAYERS):
            for here, there in zip(source, target, strict=True):
                assert block_bytes_of(rig.source, layer, here) == block_bytes_of(rig.target, layer, there)
    return activated


async def run(plan: FaultPlan) -> tuple[int, int]:
    """(activated, checksum failures) of HANDOFFS hand-offs at once."""
    sending, receiving = InprocTransport(plan), InprocTransport()
    async with open_rig(sending, receiving, config=CONFIG) as rig:
        activated = await asyncio.gather(*(push(rig, key) for key in range(HANDOFFS)))
        assert rig.receiver.held == 0
        failures = rig.receiver.counters.verify_failures
    await sending.close()
    await receiving.close()
    return sum(activated), failures


@pytest.mark.parametrize("seed", range(20))
async def test_every_flipped_bit_is_found(seed: int) -> None:
    activated, failures = await run(FaultPlan(seed=seed, corrupt=1.0))
    assert activated == 0
    assert failures >= HANDOFFS


@pytest.mark.parametrize("seed", range(10))
async def test_rare_flipped_bits_spoil_their_handoff_only(seed: int) -> None:
    activated, failures = await run(FaultPlan(seed=seed, corrupt=0.05, reorder=0.3))
    assert activated + (failures > 0) >= 1
    assert activated <= HANDOFFS - (failures > 0)


@pytest.mark.parametrize("seed", range(10))
async def test_truncated_messages_activate_nothing(seed: int) -> None:
    assert (await run(FaultPlan(seed=seed, truncate=1.0)))[0] == 0


@pytest.mark.parametrize("seed", range(10))
async def test_duplicates_reordering_and_delay_change_nothing(seed: int) -> None:
    plan = FaultPlan(seed=seed, duplicate=0.5, reorder=0.5, delay_s=0.01)
    assert await run(plan) == (HANDOFFS, 0)


@pytest.mark.parametrize("seed", range(10))
async def test_dropped_connections_never_leave_a_wrong_byte_activated(seed: int) -> None:
    await run(FaultPlan(seed=seed, drop_connection=0.02, duplicate=0.2, reorder=0.2, corrupt=0.02, truncate=0.02))


async def test_a_corrupt_block_is_named() -> None:
    sending, receiving = InprocTransport(FaultPlan(seed=1, corrupt=1.0)), InprocTransport()
    async with open_rig(sending, receiving, config=CONFIG) as rig:
        assert not await push(rig, 0)
        error = (await rig.destination.ending(DispatchKey(0, 1))).error
        assert isinstance(error, KvCorrupt)
        assert "layer" in error.message
    await sending.close()
    await receiving.close()
