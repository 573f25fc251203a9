"""A request that leaves its ratio to measured speeds: what they are taken from, and that the first choice holds for every attempt."""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import replace

import pytest

from controller.blend_ratio import CAP, FLOOR, BlendCost
from controller.blend_speeds import cost_of
from controller.kv_blend import Chunk, KvBlend, Recipe, keys_of
from controller.worker_record import WorkerRecord
from kv_transfer.keys import HASH_BYTES, chunk_hashes
from pdserve.v1 import membership_pb2, types_pb2, worker_pb2
from tests.controller.cluster_twin import ClusterTwin, asked, cluster
from tests.controller.test_kv_routing import tell_kv
from tests.controller.worker_twin import DECODE, PREFILL

IDENTITY = b"i" * 32
PROMPT = array("i", range(100, 220)).tobytes()
AUTO = KvBlend(Recipe(ratio="auto"), (Chunk(0, 32), Chunk(40, 80)))  # of 2 and 3 hash units
DISK = worker_pb2.TierReport(tier="disk", read_s=3.0, read_pages=10)
HOST = worker_pb2.TierReport(tier="host", read_s=1.0, read_pages=10)


def stored(tier: str, keys: bytes) -> worker_pb2.KvEvent:
    return worker_pb2.KvEvent(kind=worker_pb2.KvEvent.KIND_STORED, tier=tier, block_hashes=keys)


def record_of(*events: worker_pb2.KvEvent) -> WorkerRecord:
    record = WorkerRecord("p0")
    group = types_pb2.LayoutGroup(layer_count=12)
    capabilities = membership_pb2.Capabilities(block_tokens=32)
    info = membership_pb2.WorkerInfo(worker_id="p0", layout=[group], capabilities=capabilities)
    info.identity.digest = IDENTITY
    record.introduce(info)
    record.load = worker_pb2.LoadReport(prefill_token_us=500, tiers=[HOST, DISK])
    cleared = worker_pb2.KvEvent(kind=worker_pb2.KvEvent.KIND_CLEARED)
    assert record.holdings.apply(worker_pb2.KvEvents(first_sequence=1, events=[cleared, *events]))
    return record


def test_pages_below_the_device_cost_what_their_nearest_tier_took_for_a_page() -> None:
    first, second = keys_of(AUTO.chunks, PROMPT, IDENTITY, "salt")
    record = record_of(
        stored("device", first[:HASH_BYTES]), stored("disk", first + second), stored("host", second[:HASH_BYTES])
    )
    cost = cost_of(AUTO, (first, second), 120, record)
    assert cost == BlendCost(120, 72, 12, cost.token_s, cost.load_s)
    assert cost.token_s == pytest.approx(500e-6)
    assert cost.load_s == pytest.approx(0.15 + 0.05 + 2 * 0.15)


def test_a_chunk_of_which_a_unit_is_nowhere_is_not_loaded() -> None:
    first, second = keys_of(AUTO.chunks, PROMPT, IDENTITY, "")
    record = record_of(stored("disk", first + second[HASH_BYTES:]))
    assert cost_of(AUTO, (first, second), 120, record).load_s == pytest.approx(2 * 0.15)


def test_a_tier_that_was_never_read_costs_nothing_yet() -> None:
    first, second = keys_of(AUTO.chunks, PROMPT, IDENTITY, "")
    record = record_of(stored("redis", first))
    record.load.tiers.append(worker_pb2.TierReport(tier="redis"))
    assert cost_of(AUTO, (first, second), 120, record).load_s == 0


def works_of(twin: ClusterTwin) -> list[worker_pb2.Work]:
    commands = [command for worker in twin.workers.values() for command in worker.commands]
    return [command.prefill.work for command in commands if command.WhichOneof("command") == "prefill"]


async def start(twin: ClusterTwin, page_s: float) -> None:
    """The chunks lie on the disks of two prefill workers, which compute a token in 1 ms; the second one reads more slowly. Two of
    three decode workers die after 10 tokens."""
    keys = b"".join(keys_of(AUTO.chunks, PROMPT, IDENTITY, ""))
    for at, name in enumerate(("p0", "p1", "d0", "d1", "d2")):
        worker = twin.twin(name, PREFILL if name.startswith("p") else DECODE)
        worker.prefill_token_us = 1000
        worker.tiers = [worker_pb2.TierReport(tier="disk", read_s=page_s * (1 + at / 5), read_pages=1)]
        worker.faults.die_after_tokens = 10 if name in ("d0", "d1") else None
        await twin.add(worker)
        tell_kv(worker, 1, worker_pb2.KvEvent(kind=worker_pb2.KvEvent.KIND_CLEARED), stored("disk", keys))
    await twin.until(lambda: all(known(twin, name, len(keys) // HASH_BYTES) for name in ("p0", "p1")), "speeds known")


def read_at(twin: ClusterTwin, page_s: float) -> None:
    for worker in twin.workers.values():
        worker.tiers = [worker_pb2.TierReport(tier="disk", read_s=page_s, read_pages=1)]
        record = twin.fleet.record(worker.worker_id)
        assert record is not None
        record.report(worker.load(), 0.0)


def known(twin: ClusterTwin, name: str, units: int) -> bool:
    record = twin.fleet.record(name)
    return record is not None and record.load.prefill_token_us > 0 and record.holdings.units() == {"disk": units}


async def test_the_first_choice_holds_for_every_attempt_and_is_in_the_timeline() -> None:
    async with cluster() as twin:
        await start(twin, page_s=0.004)
        wanted = replace(asked(40, prompt=PROMPT), kv_blend=AUTO, request_id="auto")
        answer = asyncio.create_task(twin.collect(wanted))
        await twin.until(lambda: bool(works_of(twin)), "first attempt under way")
        read_at(twin, page_s=0.008)  # what a second choice would go by
        got = await answer
        assert len(got.token_ids[0]) == 40
        timeline = twin.desk.request("auto")
        assert timeline is not None
        choice = timeline.ratio_choice
        assert choice is not None
        assert choice.ratio is not None
        assert FLOOR < choice.ratio < CAP
        assert choice.blend_s < choice.whole_s == pytest.approx(0.12)
        assert choice.load_s in (pytest.approx(0.02), pytest.approx(0.024))
        works = works_of(twin)
        assert len(works) > 1
        assert {work.blend.ratio for work in works} == {worker_pb2.Blend(ratio=choice.ratio).ratio}
        assert all(len(work.chunks) == 2 and not work.block_hashes for work in works)


async def test_each_chunk_is_hashed_once_for_placement_the_choice_and_every_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with cluster() as twin:
        await start(twin, page_s=0.004)
        hashed: list[int] = []

        def counted(root: bytes, token_ids: bytes) -> bytes:
            hashed.append(len(token_ids) // 4)
            return chunk_hashes(root, token_ids)

        monkeypatch.setattr("controller.kv_blend.chunk_hashes", counted)
        await twin.collect(replace(asked(40, prompt=PROMPT), kv_blend=AUTO))
        works = works_of(twin)
        assert len(works) > 1
        assert all([chunk.count for chunk in work.chunks] == [32, 40] for work in works)
        assert hashed == [32, 40]


async def test_where_loading_is_too_slow_every_attempt_is_exact_and_the_timeline_says_why() -> None:
    async with cluster() as twin:
        await start(twin, page_s=1.0)
        wanted = replace(asked(40, prompt=PROMPT), kv_blend=AUTO, request_id="auto")
        got = await twin.collect(wanted)
        assert got.begun is not None
        assert got.begun.blended_tokens == 0
        timeline = twin.desk.request("auto")
        assert timeline is not None
        assert timeline.ratio_choice is not None
        assert timeline.ratio_choice.ratio is None
        assert timeline.ratio_choice.blend_s > timeline.ratio_choice.whole_s
        works = works_of(twin)
        assert len(works) > 1
        assert all(work.block_hashes and not work.chunks and not work.HasField("blend") for work in works)


async def test_a_ratio_that_the_request_gives_is_left_alone_whatever_was_measured() -> None:
    async with cluster() as twin:
        await start(twin, page_s=1.0)
        fixed = replace(asked(5, prompt=PROMPT), kv_blend=AUTO.with_ratio(0.3), request_id="fixed")
        got = await twin.collect(fixed)
        assert got.begun is not None
        assert got.begun.blended_tokens == 72
        timeline = twin.desk.request("fixed")
        assert timeline is not None
        assert timeline.ratio_choice is None
        assert {work.blend.ratio for work in works_of(twin)} == {worker_pb2.Blend(ratio=0.3).ratio}
