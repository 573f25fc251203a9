"""A prompt that kills real engines: two of them die, and the prompts that were computed beside it are answered."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from controller.grpc_api import MembershipApi
from controller.request import GenerationRequest
from pdserve.errors import RequestQuarantined
from pdserve.v1 import membership_pb2_grpc
from tests.controller.cluster_twin import ClusterTwin, asked, cluster
from tests.worker.poisoned_child import POISON
from tests.worker.processes import ROOT, WorkerProcess

pytestmark = pytest.mark.slow  # real processes

MODEL = ROOT / "models" / "pdserve-tiny"
SETS = (f"model.path={MODEL}", "model.dtype=float32", "engine.threads=1", "engine.kv_bytes=33554432")
NAMES = ("b0", "b1", "b2")


def prompt_of(first: Sequence[int], number: int) -> bytes:
    return array("i", [*first, *((31 * position + number) % 900 + 100 for position in range(300))]).tobytes()


def request_of(prompt: bytes) -> GenerationRequest:
    return replace(asked(8, prompt=prompt), want_text=False)


@asynccontextmanager
async def mortal_workers(folder: Path) -> AsyncIterator[ClusterTwin]:
    """Three that hold both roles, of a controller in this process."""
    async with cluster(grace_s=60.0, queue_timeout_s=120.0, request_timeout_s=200.0, patience=50.0) as twin:
        server = grpc.aio.server()
        api = MembershipApi(twin.fleet, "controller-under-test", 2.0)
        membership_pb2_grpc.add_MembershipServiceServicer_to_server(api, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        started: list[WorkerProcess] = []
        try:
            for name in NAMES:
                child = "tests.worker.poisoned_child"
                started.append(
                    await WorkerProcess.start(name, "prefill,decode", address, folder, sets=SETS, engine_module=child)
                )
            await asyncio.gather(*(ready(twin, name) for name in NAMES))
            yield twin
        finally:
            for worker in started:
                await worker.close()
            await server.stop(None)


async def ready(twin: ClusterTwin, name: str) -> None:
    async with asyncio.timeout(200.0):
        while twin.state(name) != "READY":  # noqa: ASYNC110 (states have no event)
            await asyncio.sleep(0.02)


async def answered(twin: ClusterTwin, request: GenerationRequest) -> list[int]:
    return [each async for item in twin.service.generate(request) for each in getattr(item, "token_ids", ())]


async def test_poison_kills_two_real_workers_and_everybody_else_is_answered(tmp_path: Path) -> None:
    async with mortal_workers(tmp_path) as twin:
        expected = [await answered(twin, request_of(prompt_of((), number))) for number in range(6)]
        poison = request_of(prompt_of(POISON, 0))
        innocent = [request_of(prompt_of((), number)) for number in range(6)]
        clients = [asyncio.create_task(answered(twin, request)) for request in innocent]
        with pytest.raises(RequestQuarantined):
            await answered(twin, poison)
        assert await asyncio.gather(*clients) == expected
        assert sorted(twin.state(name) for name in NAMES) == ["GONE", "GONE", "READY"]
        timeline = twin.desk.request(poison.request_id)
        assert timeline is not None
        assert [attempt.outcome for attempt in timeline.attempts] == ["lost", "failed"]
