"""Native engines in processes of their own behind the inproc transport: disaggregated output equals that of one worker."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from controller.grpc_api import MembershipApi
from controller.request import GenerationRequest, Route, SamplingSpec
from decode_worker.service import DecodeService
from kv_transfer.transports import open_transport
from pdserve.v1 import membership_pb2_grpc
from prefill_worker.service import PrefillService
from service_kit.config import ClusterConfig, EngineConfig, ModelConfig
from tests.controller.cluster_twin import PATIENT_TRANSFER, ClusterTwin, Got, cluster
from worker_runtime.engine_link import ProcessEngineLink
from worker_runtime.holding import RoleName
from worker_runtime.node_settings import NodeSettings, new_incarnation
from worker_runtime.worker_node import WorkerNode

pytestmark = pytest.mark.slow  # engine processes

MODEL = Path(__file__).parents[2] / "models" / "pdserve-tiny"
WORKERS: tuple[tuple[str, RoleName], ...] = (("p0", "prefill"), ("d0", "decode"))
LOGPROB_TOLERANCE = 1e-3


async def open_worker(worker_id: str, role: RoleName, config: ClusterConfig) -> WorkerNode:
    link = await ProcessEngineLink.start(config.model_dump_json().encode(), 200.0, ())
    settings = NodeSettings(worker_id, frozenset({role}), config, "test", new_incarnation())
    transports = {"inproc": open_transport("inproc", config.transfer, "127.0.0.1")}
    return await WorkerNode.open(settings, link, (PrefillService, DecodeService), transports=transports)


@asynccontextmanager
async def pair(prefill_chunk: int) -> AsyncIterator[ClusterTwin]:
    async with cluster(grace_s=30.0, request_timeout_s=120.0, patience=20.0) as twin:
        server = grpc.aio.server()
        api = MembershipApi(twin.fleet, "controller-under-test", 2.0)
        membership_pb2_grpc.add_MembershipServiceServicer_to_server(api, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        config = ClusterConfig(
            controllers=(f"127.0.0.1:{port}",),
            model=ModelConfig(path=str(MODEL), dtype="float32", device="cpu"),
            engine=EngineConfig(kv_bytes=32 * 2**20, threads=1, prefill_chunk=prefill_chunk, prefix_reuse=False),
            transfer=PATIENT_TRANSFER,
        )
        nodes = [await open_worker(worker_id, role, config) for worker_id, role in WORKERS]
        running = [asyncio.create_task(node.run()) for node in nodes]
        try:
            await twin.until(lambda: sum(r.member.takes_work for r in twin.fleet.records()) == len(nodes), "all ready")
            yield twin
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await asyncio.gather(*(node.close() for node in nodes))
            await server.stop(None)


def asked(name: str, length: int, temperature: float, route: Route) -> GenerationRequest:
    prompt = array("i", [(13 * position) % 1000 + 20 for position in range(length)]).tobytes()
    sampling = SamplingSpec(max_tokens=12, seed=5, ignore_eos=True, temperature=temperature, logprobs=1)
    return GenerationRequest(f"{name}-{length}-{temperature}", prompt, sampling, n=3, want_text=False, route=route)


def logprobs(got: Got) -> list[float]:
    return [row.logprobs[0] for choice in sorted(got.logprobs) for row in got.logprobs[choice]]


@pytest.mark.parametrize("prefill_chunk", [64, 0])
async def test_three_choices_greedy_and_seeded_equal_those_of_one_worker(prefill_chunk: int) -> None:
    async with pair(prefill_chunk) as twin:
        for length in (1, 17, 300):
            for temperature in (0.0, 0.8):
                alone = await twin.collect(asked("alone", length, temperature, Route("", "d0")))
                apart = await twin.collect(asked("apart", length, temperature, Route("p0", "d0")))
                assert apart.token_ids == alone.token_ids
                assert {len(ids) for ids in apart.token_ids.values()} == {12}
                assert logprobs(apart) == pytest.approx(logprobs(alone), abs=LOGPROB_TOLERANCE)
        await twin.until(twin.idle, "idle")
