"""Real processes, real signals, in the middle of a transfer: seen at once when killed, within the heartbeats when stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from kv_transfer.leases import DispatchKey
from kv_transfer.transports import open_transport
from pdserve.errors import TransferFailed
from pdserve.v1 import worker_pb2
from service_kit.config import TransferConfig
from tests.child_processes import REAP_S, tied
from tests.kv_transfer.processes import CONFIG, GEOMETRY
from tests.kv_transfer.rig import Rig, eventually, open_rig

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]  # real processes
ROOT = Path(__file__).parents[2]
KEY = DispatchKey(1, 1)
START_S = 60.0
NOTICED_S = 25.0  # by heartbeats at the latest, on a busy machine; the lease would take 60
SILENT = "no heartbeat"  # what the hand-off says of a peer that it noticed by its heartbeats alone
TOKENS = GEOMETRY.blocks * 16
SETTINGS = TransferConfig.model_validate(CONFIG)
TRANSPORTS = os.environ.get("PDSERVE_TEST_TRANSPORTS", "ucx,tcp").split(",")  # as in tests/contracts


@pytest_asyncio.fixture(loop_scope="module", params=TRANSPORTS)
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    name = str(request.param)
    sending, receiving = (open_transport(name, SETTINGS, "127.0.0.1") for _ in range(2))
    async with open_rig(sending, receiving, GEOMETRY, SETTINGS) as made:
        yield made
    await sending.close()
    await receiving.close()


async def spawn(module: str, *arguments: str) -> asyncio.subprocess.Process:
    command = tied([sys.executable, "-m", f"tests.kv_transfer.{module}", *arguments])
    return await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=ROOT)


async def line_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(START_S):
        return (await process.stdout.readline()).decode()


async def end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    async with asyncio.timeout(REAP_S):
        await process.wait()


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_sender_lost_inside_its_transfer_is_fenced(rig: Rig, sign: signal.Signals) -> None:
    grant = rig.reserve(tuple(range(GEOMETRY.blocks)), TOKENS)
    process = await spawn("sender_process", rig.transport, rig.address, grant.SerializeToString().hex(), str(TOKENS))
    try:
        assert await line_of(process) == "sending\n"
        await eventually(lambda: any(rig.target.arena.blocks(0, 0, 1)[:64]), START_S)
        os.kill(process.pid, sign)
        started_s = time.monotonic()
        ending = await rig.destination.ending(KEY, SETTINGS.lease_s * 2)
        assert time.monotonic() - started_s < NOTICED_S
        assert isinstance(ending.error, TransferFailed)
        assert (SILENT in ending.error.message) == (sign is signal.SIGSTOP)
        landed = bytes(rig.target.arena.blocks(2, 0, GEOMETRY.blocks))
        if sign is signal.SIGSTOP:
            os.kill(process.pid, signal.SIGCONT)  # it wakes up and goes on sending: nothing may land
            await asyncio.sleep(0.3)
        assert landed == bytes(rig.target.arena.blocks(2, 0, GEOMETRY.blocks))
    finally:
        await end(process)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_receiver_lost_inside_its_transfer_fails_the_handoff(rig: Rig, sign: signal.Signals) -> None:
    process = await spawn("receiver_process", rig.transport)
    try:
        address, grant_hex = (await line_of(process)).split()
        grant = worker_pb2.Grant.FromString(bytes.fromhex(grant_hex))
        rig.address = address
        handoff = rig.start(grant, TOKENS)
        handoff.source_blocks(tuple(range(GEOMETRY.blocks)))
        for layer in range(GEOMETRY.layers):
            handoff.kv_ready(layer, 0, GEOMETRY.blocks)
        await eventually(lambda: handoff._pusher.segments > 20, START_S)
        os.kill(process.pid, sign)
        started_s = time.monotonic()
        async with asyncio.timeout(SETTINGS.lease_s * 2):
            outcome = await handoff.outcome()
        assert time.monotonic() - started_s < NOTICED_S
        assert isinstance(outcome.error, TransferFailed)
        assert (SILENT in outcome.error.message) == (sign is signal.SIGSTOP)
    finally:
        await end(process)
