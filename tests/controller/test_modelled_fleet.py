"""The controller with whole workers of the real kind, only their engines modelled: sessions, hand-offs, cancels, deaths."""

from __future__ import annotations

import asyncio
import random
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from controller.grpc_api import MembershipApi
from controller.request import GenerationRequest, Route, SamplingSpec
from pdserve.v1 import membership_pb2_grpc
from service_kit.config import ClusterConfig
from simulator.fleet import Fleet, FleetSettings
from simulator.modelled_engine import ModelledConfig
from tests.controller.cluster_twin import ClusterTwin, Got, cluster

PROMPT = array("i", range(20, 90)).tobytes()
MODELLED = ModelledConfig()
_IDS = iter(range(10**9))


def asked(max_tokens: int = 30, *, n: int = 1, seed: int = 5, route: Route | None = None) -> GenerationRequest:
    sampling = SamplingSpec(max_tokens=max_tokens, seed=seed, ignore_eos=True)
    return GenerationRequest(f"m{next(_IDS)}", PROMPT, sampling, n=n, want_text=False, route=route)


@asynccontextmanager
async def controller_with(
    prefill: int, decode: int, both: int = 0, engine: ModelledConfig = MODELLED
) -> AsyncIterator[tuple[ClusterTwin, ClusterConfig]]:
    async with cluster(grace_s=3.0) as twin:
        server = grpc.aio.server()
        api = MembershipApi(twin.fleet, "controller-under-test", 2.0)
        membership_pb2_grpc.add_MembershipServiceServicer_to_server(api, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        config = ClusterConfig(controllers=(f"127.0.0.1:{port}",))
        fleet = await Fleet.open(FleetSettings(prefill, decode, both, engine), config)
        running = asyncio.create_task(fleet.run())
        try:
            count = prefill + decode + both
            await twin.until(lambda: sum(r.member.takes_work for r in twin.fleet.records()) == count, "all ready")
            yield twin, config
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await fleet.close()
            await server.stop(None)


def all_free(twin: ClusterTwin) -> bool:
    loads = [record.load for record in twin.fleet.records()]
    return all(load.blocks_free == load.blocks_total and not load.blocks_leaked and not load.running for load in loads)


async def test_disaggregated_tokens_equal_those_of_one_worker() -> None:
    async with controller_with(2, 2) as (twin, _):
        alone = await twin.collect(asked(n=3, route=Route("", "d0")))
        apart = await twin.collect(asked(n=3, route=Route("p0", "d1")))
        free = await twin.collect(asked(n=3))
        assert alone.token_ids == apart.token_ids == free.token_ids
        assert {len(ids) for ids in alone.token_ids.values()} == {30}
        await twin.until(twin.idle, "idle")


async def test_random_cancels_leave_nothing_behind() -> None:
    rng = random.Random(4)

    async def impatient(twin: ClusterTwin) -> None:
        got, patience = Got(), rng.choice([0, 1, 2, 5, 20, 1000])
        stream = twin.service.generate(asked(rng.choice([1, 5, 40]), n=rng.choice([1, 3]), seed=rng.randrange(99)))
        if patience == 0:
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(rng.random() * 0.005)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            async for item in stream:
                got.add(item)
                if got.count >= patience:
                    break
        await stream.aclose()  # type: ignore[attr-defined]

    async with controller_with(2, 2, 1) as (twin, _):
        await asyncio.gather(*(impatient(twin) for _ in range(120)))
        await twin.until(twin.idle, "idle")
        await twin.until(lambda: all_free(twin), "every block free")


async def test_roles_change_under_load_without_an_error() -> None:
    async with controller_with(2, 2) as (twin, _):
        expected = (await twin.collect(asked(60))).token_ids
        streams = [asyncio.create_task(twin.collect(asked(60))) for _ in range(30)]
        await twin.until(lambda: twin.service.live_requests == 30, "all live")
        await twin.desk.set_roles("p1", ("decode",))
        await twin.desk.set_roles("d1", ("prefill",))
        for got in await asyncio.gather(*streams):
            assert got.token_ids == expected
        await twin.until(twin.idle, "idle")


def dispatches(twin: ClusterTwin, worker_id: str) -> int:
    record = twin.fleet.record(worker_id)
    assert record is not None
    return record.dispatches


async def test_a_lost_node_is_survived() -> None:
    async with controller_with(1, 1) as (twin, config):
        expected = (await twin.collect(asked(1500))).token_ids
        doomed = await Fleet.open(FleetSettings(0, 1, 0, MODELLED, prefix="doomed-"), config)
        running = asyncio.create_task(doomed.run())
        await twin.until(lambda: twin.state("doomed-d0") == "READY", "joined")
        streams = [asyncio.create_task(twin.collect(asked(1500))) for _ in range(6)]
        await twin.until(lambda: dispatches(twin, "doomed-d0") > 0 and dispatches(twin, "p0") == 0, "decoding")
        await doomed.close()
        for got in await asyncio.gather(*streams):
            assert got.token_ids == expected
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
