"""A blended prompt goes where its chunks are, or where they are loaded soonest; the chosen worker and the reason are told."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterable
from dataclasses import replace

import pytest

from controller.blend_ratio import FLOOR, BlendCost
from controller.chunk_reuse import BlendDemand, RememberedReuse, blend_demand, chunk_reuse
from controller.kv_blend import Chunk, KvBlend, Recipe, keys_of
from controller.kv_holdings import KvHoldings
from controller.kv_prices import GUESSED_SHARE, KvPrices, prices_of
from controller.placement.snapshot import NO_REUSE, Reuse
from controller.request import Route
from kv_transfer.keys import HASH_BYTES, split_keys
from pdserve.v1 import worker_pb2
from tests.controller.cluster_twin import ClusterTwin, asked, cluster
from tests.controller.test_kv_routing import CLEARED, STORED, tell_kv, units
from tests.controller.worker_twin import DECODE, PREFILL

IDENTITY = b"i" * 32
PROMPT = array("i", (1 + number * number % 251 for number in range(600))).tobytes()
BLEND = KvBlend(Recipe(), (Chunk(0, 256), Chunk(300, 556)))
KEYS = keys_of(BLEND.chunks, PROMPT, IDENTITY, "")
PRICES = KvPrices({"host": 0.01, "disk": 0.2})
UNITS = 16  # of each chunk
UNIT_KEYS = [[*split_keys(keys)] for keys in KEYS]


def stored(tier: str, keys: bytes) -> worker_pb2.KvEvent:
    return worker_pb2.KvEvent(kind=STORED, tier=tier, block_hashes=keys)


def holding(*events: worker_pb2.KvEvent) -> KvHoldings:
    holdings = KvHoldings()
    cleared = worker_pb2.KvEvent(kind=CLEARED)
    assert holdings.apply(worker_pb2.KvEvents(first_sequence=1, events=[cleared, *events]))
    return holdings


def demanded(asked_blend: KvBlend = BLEND, layers: int = 12) -> BlendDemand:
    demand = blend_demand(asked_blend, UNIT_KEYS, 600, layers)
    assert demand is not None
    return demand


def reused(*events: worker_pb2.KvEvent, asked_blend: KvBlend = BLEND) -> Reuse:
    return chunk_reuse(demanded(asked_blend), holding(*events), PRICES)


def test_chunks_count_where_all_of_each_is_whatever_their_order_and_offset() -> None:
    assert reused(stored("device", KEYS[1] + KEYS[0])) == Reuse(device_tokens=512)
    assert reused(stored("device", KEYS[1])) == Reuse(device_tokens=256)
    assert reused(stored("device", KEYS[0][:-HASH_BYTES])) == NO_REUSE
    assert reused(stored("device", KEYS[0][HASH_BYTES:]), stored("host", KEYS[0][HASH_BYTES:])) == NO_REUSE


def test_the_load_costs_each_unit_from_its_nearest_tier_less_what_the_first_layer_hides() -> None:
    first_layer = 600 / 12
    on_disk = reused(stored("disk", KEYS[0] + KEYS[1]), stored("host", KEYS[1][: 4 * HASH_BYTES]))
    cost = 16 * (0.2 * (2 * UNITS - 4) + 0.01 * 4) - first_layer
    assert on_disk.stored_tokens == 512
    assert on_disk.load_cost_tokens == pytest.approx(cost)
    assert reused(stored("host", KEYS[0])) == Reuse(stored_tokens=256)
    epic = replace(BLEND, recipe=Recipe("epic"))
    assert reused(stored("host", KEYS[0]), asked_blend=epic).load_cost_tokens == pytest.approx(16 * 0.01 * UNITS)


def test_a_unit_on_the_device_is_not_loaded_and_an_unknown_tier_costs_the_guess() -> None:
    epic = replace(BLEND, recipe=Recipe("epic"))
    mixed = reused(stored("tape", KEYS[0]), stored("device", KEYS[0][: 6 * HASH_BYTES]), asked_blend=epic)
    assert mixed.stored_tokens == 256
    assert mixed.load_cost_tokens == pytest.approx(16 * GUESSED_SHARE * (UNITS - 6))


@pytest.mark.parametrize(("ratio", "counted"), [(0.0, 0.0), (0.3, 0.3), ("auto", FLOOR)])
def test_what_is_computed_anew_of_the_chunks_is_what_the_choice_of_a_ratio_counts_with(
    ratio: float | str, counted: float
) -> None:
    demand = demanded(replace(BLEND, recipe=Recipe(ratio=ratio)))  # type: ignore[arg-type]
    cost = BlendCost(600, 512, 12, token_s=1.0, load_s=0.0)
    assert 600 - 512 + demand.recomputed_tokens == pytest.approx(cost.computed_s(counted), abs=0.5)


def test_epic_computes_the_first_tokens_of_each_chunk_anew() -> None:
    assert demanded(replace(BLEND, recipe=Recipe("epic", first_tokens=40))).recomputed_tokens == 80


def test_a_prompt_that_engines_compute_whole_looks_for_no_chunk() -> None:
    assert blend_demand(replace(BLEND, recipe=Recipe(ratio=0.9)), UNIT_KEYS, 600, 12) is None
    assert blend_demand(BLEND, UNIT_KEYS, 600, 2) is None


def test_a_tier_is_priced_by_what_was_measured_and_never_above_computing() -> None:
    tiers = [
        worker_pb2.TierReport(tier="host", read_s=1.0, read_pages=1000),
        worker_pb2.TierReport(tier="disk", read_s=1.0, read_pages=10),
        worker_pb2.TierReport(tier="redis"),
    ]
    measured = prices_of(worker_pb2.LoadReport(prefill_token_us=100, tiers=tiers), 32)
    assert list(measured.tiers) == ["host", "disk", "redis"]
    assert measured.tiers == {"host": pytest.approx(0.001 / 32 / 100e-6), "disk": 1.0, "redis": GUESSED_SHARE}
    unmeasured = prices_of(worker_pb2.LoadReport(tiers=tiers), 32)
    assert set(unmeasured.tiers.values()) == {GUESSED_SHARE}


async def start(twin: ClusterTwin, tiers: dict[str, str]) -> None:
    """Prefill workers that compute a token in 1 ms, read one from the host tier in 0.01 ms and from disk in 0.5 ms, each with both
    chunks in one tier."""
    reports = [
        worker_pb2.TierReport(tier="host", read_s=0.00016, read_pages=1),
        worker_pb2.TierReport(tier="disk", read_s=0.008, read_pages=1),
    ]
    for name in ("p0", "p1", "p2", "d0"):
        worker = twin.twin(name, PREFILL if name.startswith("p") else DECODE)
        worker.prefill_token_us, worker.tiers = 1000, reports
        await twin.add(worker)
    for name, tier in tiers.items():
        tell_kv(twin.workers[name], 1, worker_pb2.KvEvent(kind=CLEARED), stored(tier, KEYS[0] + KEYS[1]))
        await twin.until(lambda name=name: bool(units(twin, name)), f"events of {name} came")  # type: ignore[misc]


async def computed_at(twin: ClusterTwin, request_id: str) -> str:
    await twin.collect(replace(asked(2, prompt=PROMPT), kv_blend=BLEND, request_id=request_id))
    timeline = twin.desk.request(request_id)
    assert timeline is not None
    return timeline.summary.prefill_worker


@pytest.mark.parametrize(
    ("tiers", "chosen"),
    [
        ({"p1": "disk"}, "p1"),
        ({"p1": "disk", "p2": "host"}, "p2"),
        ({"p0": "device", "p1": "disk"}, "p0"),
    ],
)
async def test_a_blended_prompt_goes_where_its_chunks_are_nearest_every_time(
    tiers: dict[str, str], chosen: str
) -> None:
    async with cluster() as twin:
        await start(twin, tiers)
        assert {await computed_at(twin, f"r{number}") for number in range(5)} == {chosen}


async def test_the_decision_tells_what_of_the_chunks_each_candidate_holds() -> None:
    async with cluster() as twin:
        await start(twin, {"p1": "disk", "p2": "device"})
        await computed_at(twin, "told")
        timeline = twin.desk.request("told")
        assert timeline is not None
        decision = timeline.decisions[0]
        assert decision.reused == "chunks"
        assert decision.recomputed_tokens == demanded().recomputed_tokens
        held = {
            each.prefill_worker: (each.device_tokens, each.stored_tokens) for each in decision.candidates if each.terms
        }
        assert held == {"p0": (0, 0), "p1": (0, 512), "p2": (512, 0)}
        terms = {each.prefill_worker: each.terms for each in decision.candidates if each.terms}
        assert terms["p1"]["load"] > 0 == terms["p2"]["load"]
        assert terms["p0"]["prefill"] > terms["p1"]["prefill"] == terms["p2"]["prefill"]


async def test_a_queue_in_front_of_the_worker_with_the_chunks_sends_the_prompt_elsewhere() -> None:
    async with cluster() as twin:
        await start(twin, {"p1": "device"})
        record = twin.fleet.record("p1")
        assert record is not None
        busy = worker_pb2.LoadReport()
        busy.CopyFrom(record.load)
        busy.waiting_tokens = 5000
        record.report(busy, 0.0)
        assert await computed_at(twin, "elsewhere") != "p1"


class CountedHoldings(KvHoldings):
    def __init__(self) -> None:
        super().__init__()
        self.look_ups = 0  # of a chunk

    def units_by_tier(self, keys: Iterable[bytes], nearest: Iterable[str]) -> dict[str, int] | None:
        self.look_ups += 1
        return super().units_by_tier(keys, nearest)


def counted(twin: ClusterTwin, name: str) -> CountedHoldings:
    record = twin.fleet.record(name)
    assert record is not None
    if not isinstance(record.holdings, CountedHoldings):
        record.holdings = CountedHoldings()
    assert isinstance(record.holdings, CountedHoldings)
    return record.holdings


def test_what_was_looked_up_holds_until_the_holdings_or_the_price_of_a_load_change() -> None:
    holdings, remembered = CountedHoldings(), RememberedReuse(demanded(replace(BLEND, recipe=Recipe("epic"))))
    slower = KvPrices({"host": 0.02, "disk": 0.2})
    cleared = worker_pb2.KvEvent(kind=CLEARED)

    def looked_up(prices: KvPrices) -> tuple[int, Reuse]:
        before = holdings.look_ups
        reuse = remembered.at(holdings, prices)
        assert reuse == chunk_reuse(remembered.demand, holdings, prices)
        return holdings.look_ups - before - len(BLEND.chunks), reuse

    assert holdings.apply(worker_pb2.KvEvents(first_sequence=1, events=[cleared, stored("device", KEYS[0])]))
    assert looked_up(PRICES) == (2, Reuse(256))
    assert looked_up(PRICES)[0] == 0
    assert looked_up(slower)[0] == 0, "nothing is loaded"
    assert holdings.apply(worker_pb2.KvEvents(first_sequence=3, events=[stored("host", KEYS[1])]))
    assert looked_up(slower)[0] == 2
    assert looked_up(KvPrices({**slower.tiers}))[0] == 0, "the same prices, reported again"
    assert looked_up(PRICES)[0] == 2
    assert holdings.apply(worker_pb2.KvEvents(first_sequence=1, events=[cleared]))
    assert looked_up(PRICES) == (2, NO_REUSE)


@pytest.mark.parametrize("route", [None, Route("p0", "d0")])
async def test_a_blended_prompt_that_waits_is_not_looked_up_again_at_every_report(route: Route | None) -> None:
    async with cluster() as twin:
        await twin.add(twin.twin("d0", DECODE, max_batch=1))
        for name in ("p0", "p1"):
            await twin.add(twin.twin(name, PREFILL))
            counted(twin, name)
            tell_kv(twin.workers[name], 1, worker_pb2.KvEvent(kind=CLEARED), stored("device", KEYS[0]))
        await twin.until(lambda: bool(units(twin, "p0") and units(twin, "p1")), "events came")
        running = asyncio.create_task(twin.collect(asked(4000)))
        await twin.until(lambda: bool(twin.workers["d0"].runs), "d0 is full")
        wanted = [replace(asked(2, prompt=PROMPT), kv_blend=BLEND, route=route) for _ in range(5)]
        waiting = [asyncio.create_task(twin.collect(request)) for request in wanted]
        await twin.until(lambda: twin.service.queued == 5, "all wait")
        twin.service.changed("d0")

        def looked_up(pumps: int) -> dict[str, int]:
            before = {name: counted(twin, name).look_ups for name in ("p0", "p1")}
            for _ in range(pumps):
                twin.service.changed("p0")
            return {name: counted(twin, name).look_ups - before[name] for name in before}

        assert looked_up(40) == {"p0": 0, "p1": 0}
        assert counted(twin, "p1").apply(worker_pb2.KvEvents(first_sequence=3, events=[stored("device", KEYS[1])]))
        assert looked_up(40) == {"p0": 0, "p1": 0 if route else len(BLEND.chunks)}  # the first in the queue alone
        for task in (running, *waiting):
            task.cancel()
        await asyncio.gather(running, *waiting, return_exceptions=True)


async def test_a_forced_route_is_told_what_its_worker_held_though_it_was_not_asked_for() -> None:
    async with cluster() as twin:
        await start(twin, {"p1": "device"})
        routed = replace(asked(2, prompt=PROMPT), kv_blend=BLEND, request_id="routed", route=Route("p1", "d0"))
        await twin.collect(routed)
        timeline = twin.desk.request("routed")
        assert timeline is not None
        decision = timeline.decisions[0]
        assert (decision.reason, decision.reused) == ("forced", "chunks")
        assert {each.device_tokens for each in decision.candidates if each.prefill_worker == "p1"} == {512}
