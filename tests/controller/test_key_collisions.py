"""A test build whose keys have 8 or 12 bits, through the whole path: controller, engines, hand-offs, tiers, Redis, pulls from peers.

Different pages then really have the same key, everywhere at once; without fingerprints, only their tokens tell them apart. Every
answer is that of a build with whole keys.
"""

from __future__ import annotations

import asyncio
import random
import sys
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import grpc
import pytest

from controller.grpc_api import MembershipApi
from controller.kv_blend import Chunk, KvBlend, Recipe
from controller.request import GenerationRequest, Route, SamplingSpec
from controller.worker_record import WorkerRecord
from decode_worker.service import DecodeService
from kv_store.open_store import StorePlace, open_store
from kv_transfer.transports import open_transport
from pdserve.v1 import membership_pb2_grpc, worker_pb2
from prefill_worker.service import PrefillService
from service_kit.config import ClusterConfig, EngineConfig, ModelConfig, StoreConfig
from tests.controller.cluster_twin import PATIENT_TRANSFER, ClusterTwin, cluster
from tests.controller.test_native_inproc import MODEL
from tests.kv_store.redis_server import running_redis
from tests.kv_transfer.short_keys import WHOLE_FINGERPRINT, shortened_keys
from worker_runtime.engine_link import ProcessEngineLink
from worker_runtime.holding import RoleName
from worker_runtime.node_settings import NodeSettings, new_incarnation
from worker_runtime.worker_node import WorkerNode

pytestmark = pytest.mark.slow  # engine processes

WORKERS: dict[str, RoleName] = {"p0": "prefill", "p1": "prefill", "d0": "decode"}
WHOLE_KEYS = 0
PAGE_TOKENS, PAGE_BYTES = 16, 16 * 4 * 2 * 2 * 64 * 4  # 4 layers, K and V, 2 heads of 64, float32
POOL_PAGES, HOST_PAGES = 96, 48  # less than all prompts together have
PROMPTS, BLENDED_PROMPTS = 18, 8
SALTS = ("", "one tenant", "another")


@dataclass(frozen=True, slots=True)
class Build:
    """bits: of its keys; WHOLE_KEYS = not shortened. fingerprint_bits: of the fingerprints beside them."""

    bits: int
    folder: Path
    fingerprint_bits: int = WHOLE_FINGERPRINT
    redis_url: str = ""

    def config(self, controller: str) -> ClusterConfig:
        return ClusterConfig(
            controllers=(controller,),
            model=ModelConfig(path=str(MODEL), dtype="float32", device="cpu"),
            engine=EngineConfig(kv_bytes=POOL_PAGES * PAGE_BYTES, threads=1),
            store=StoreConfig(
                host_bytes=HOST_PAGES * PAGE_BYTES,
                disk_bytes=2**28,
                redis_url=self.redis_url,
                load_deadline_s=20.0,
            ),
            transfer=PATIENT_TRANSFER,
        )

    async def worker(self, worker_id: str, config: ClusterConfig) -> WorkerNode:
        command = (sys.executable, "-m", "tests.worker.colliding_engine") if self.bits else ()
        environment = {
            "KEY_BITS": str(self.bits),
            "FINGERPRINT_BITS": str(self.fingerprint_bits),
            "PYTHONPATH": str(MODEL.parents[1]),
        }
        link = await ProcessEngineLink.start(config.model_dump_json().encode(), 200.0, command, environment)
        settings = NodeSettings(worker_id, frozenset({WORKERS[worker_id]}), config, "test", new_incarnation())
        place = StorePlace(self.folder / worker_id)
        return await WorkerNode.open(
            settings,
            link,
            (PrefillService, DecodeService),
            transports={"inproc": open_transport("inproc", config.transfer, "127.0.0.1")},
            open_store=lambda page_format, news: open_store(config.store, place, page_format, news.listener),
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[ClusterTwin]:
        keys = shortened_keys(self.bits, self.fingerprint_bits) if self.bits else nullcontext()
        with keys:
            async with cluster(grace_s=60.0, request_timeout_s=120.0, patience=50.0) as twin:
                server = grpc.aio.server()
                api = MembershipApi(twin.fleet, "controller-under-test", 2.0)
                membership_pb2_grpc.add_MembershipServiceServicer_to_server(api, server)
                config = self.config(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
                await server.start()
                nodes = await asyncio.gather(*(self.worker(worker_id, config) for worker_id in WORKERS))
                running = [asyncio.create_task(node.run()) for node in nodes]
                try:
                    await twin.until(lambda: sum(r.member.takes_work for r in twin.fleet.records()) == 3, "all ready")
                    yield twin
                finally:
                    for task in running:
                        task.cancel()
                    await asyncio.gather(*running, return_exceptions=True)
                    await asyncio.gather(*(node.close() for node in nodes))
                    await server.stop(None)


def blended_prompts() -> list[tuple[bytes, KvBlend]]:
    """Of three chunks each, which stand in other prompts too, at other places."""
    rng = random.Random(12)
    chunks = [array("i", (rng.randrange(20, 1000) for _ in range(rng.randint(30, 90)))) for _ in range(8)]
    found: list[tuple[bytes, KvBlend]] = []
    for _ in range(BLENDED_PROMPTS):
        tokens, spans = array("i"), list[Chunk]()
        for chunk in rng.sample(chunks, 3):
            tokens.append(rng.randrange(20, 1000))
            spans.append(Chunk(len(tokens), len(tokens) + len(chunk)))
            tokens += chunk
        tokens.extend(rng.randrange(20, 1000) for _ in range(6))
        found.append((tokens.tobytes(), KvBlend(Recipe(), tuple(spans))))
    return found


def prompts() -> list[bytes]:
    """Of 3 to 14 pages; every second one goes on from the beginning of an earlier one."""
    rng = random.Random(11)
    found: list[array[int]] = []
    for number in range(PROMPTS):
        tokens = array("i", (rng.randrange(20, 1000) for _ in range(rng.randint(50, 230))))
        if number % 2:
            earlier = rng.choice(found)
            tokens = (earlier[: rng.randrange(len(earlier))] + tokens)[:230]
        found.append(tokens)
    return [tokens.tobytes() for tokens in found]


async def answers(twin: ClusterTwin) -> list[list[int]]:
    """All prompts, blended ones too, by one prefill worker, by the other one, and by the first again: first those that are on no
    device any more."""
    asked: list[tuple[bytes, KvBlend | None]] = [*((prompt, None) for prompt in prompts()), *blended_prompts()]
    found: list[list[int]] = []
    for turn, prefill, order in ((1, "p0", asked), (2, "p1", asked[::-1]), (3, "p0", asked)):
        for number, (prompt, blend) in enumerate(order):
            sampling = SamplingSpec(max_tokens=6, seed=5, ignore_eos=True, temperature=0.0)
            route = Route(prefill, "d0")
            request = GenerationRequest(f"{turn}-{number}", prompt, sampling, want_text=False, route=route)
            salt = "" if blend else SALTS[prompt[0] % len(SALTS)]
            got = await twin.collect(replace(request, cache_salt=salt, kv_blend=blend))
            assert got.begun is not None
            assert (got.begun.blended_tokens > 0) == (blend is not None)
            found.append(got.token_ids[0])
        record = record_of(twin, prefill)
        await twin.until(partial(settled, record), f"{prefill} has stored its pages")
    return found


def record_of(twin: ClusterTwin, worker_id: str) -> WorkerRecord:
    record = twin.fleet.record(worker_id)
    assert record is not None
    return record


def tiers_of(record: WorkerRecord) -> dict[str, worker_pb2.TierReport]:
    return {report.tier: report for report in record.load.tiers}


def settled(record: WorkerRecord) -> bool:
    """What the controller knows of the tiers is what they report, page by page, and nothing is held on the device."""
    tiers, load = tiers_of(record), record.load
    told = record.holdings.units()
    pages_agree = all(name in tiers and told.get(name, 0) == tiers[name].pages for name in ("host", "disk"))
    return pages_agree and load.blocks_free == load.blocks_total == POOL_PAGES and not load.blocks_leaked


def collisions(record: WorkerRecord) -> Counter[str]:
    """By tier; bad pages of other kinds are none of these."""
    found = Counter({name: report.verify_failures.get("fingerprint", 0) for name, report in tiers_of(record).items()})
    assert all(set(report.verify_failures) <= {"fingerprint"} for report in record.load.tiers)
    found["device"] = record.load.key_collisions
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The answers of the build with whole keys."""

    async def run() -> list[list[int]]:
        async with Build(WHOLE_KEYS, tmp_path_factory.mktemp("whole")).running() as twin:
            found = await answers(twin)
            assert not sum((collisions(record) for record in twin.fleet.records()), Counter[str]())
            return found

    return asyncio.run(run())


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    with running_redis(tmp_path) as server:
        yield server.url


async def check(build: Build, expected: list[list[int]]) -> None:
    async with build.running() as twin:
        assert await answers(twin) == expected
        await twin.until(lambda: all(settled(record) for record in twin.fleet.records()), "all accounts agree")
        records = list(twin.fleet.records())
        met = sum((collisions(record) for record in records), Counter[str]())
        assert set(met) == {"device", "host", "disk", *(["redis"] if build.redis_url else [])}, met
        for record in records:
            tiers = tiers_of(record)
            assert tiers["host"].used_bytes == tiers["host"].pages * PAGE_BYTES
            assert tiers["disk"].used_bytes % max(1, tiers["disk"].pages) == 0
            assert record.load.loads.late == 0
        # p1's first prompt: nothing was computed there yet, so that whatever lies elsewhere is worth loading.
        loaded = record_of(twin, "p1").load.loads.loaded_tokens
        assert loaded["redis" if build.redis_url else "peer"] > 0


@pytest.mark.parametrize(("bits", "fingerprint_bits"), [(8, WHOLE_FINGERPRINT), (12, WHOLE_FINGERPRINT), (8, 0)])
async def test_pages_that_share_a_key_are_never_taken_for_each_other(
    bits: int, fingerprint_bits: int, expected: list[list[int]], tmp_path: Path
) -> None:
    await check(Build(bits, tmp_path, fingerprint_bits), expected)


@pytest.mark.parametrize("fingerprint_bits", [WHOLE_FINGERPRINT, 0])
async def test_nor_are_those_that_lie_in_redis_for_all(
    redis_url: str, fingerprint_bits: int, expected: list[list[int]], tmp_path: Path
) -> None:
    await check(Build(8, tmp_path, fingerprint_bits, redis_url), expected)
