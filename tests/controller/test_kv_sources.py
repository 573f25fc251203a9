"""A worker is told of the one peer that holds clearly more of its prompt, and only of one that it can reach."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.kv_prices import NOTHING_MEASURED, KvPrices, prices_of
from controller.kv_sources import LEAST_GAIN_TOKENS, Source, best_source, with_pulls
from controller.placement.snapshot import NO_REUSE, Reuse
from kv_transfer.keys import chain_hashes
from pdserve.v1 import types_pb2, worker_pb2
from tests.controller.cluster_twin import PROMPT, asked, cluster
from tests.controller.placement.test_place import worker
from tests.controller.test_kv_routing import CLEARED, stored, tell_kv, units
from tests.controller.worker_twin import DECODE, PREFILL, WorkerTwin


class PullingTwin(WorkerTwin):
    """Computes a token in 1 ms, and has pulled pages of its peers in so many microseconds each."""

    def __init__(
        self,
        fleet: dict[str, WorkerTwin],
        name: str,
        roles: tuple[types_pb2.Role.ValueType, ...],
        pulls: dict[str, float],
    ) -> None:
        super().__init__(fleet, name, roles)
        self.prefill_token_us = 1000
        self.pulls = pulls

    def load(self) -> worker_pb2.LoadReport:
        report = super().load()
        speeds = [worker_pb2.PullSpeed(worker_id=peer, page_us=page_us) for peer, page_us in self.pulls.items()]
        report.loads.pull_speeds.extend(speeds)
        return report


PULLER, NEAR, FAR = worker("w0"), worker("w1"), worker("w2")


def test_the_worker_that_holds_most_is_named_with_what_it_holds() -> None:
    reuse = {"w0": Reuse(64), "w1": Reuse(128, 64), "w2": Reuse(16, 240)}
    assert best_source(PULLER, [PULLER, NEAR, FAR], reuse) == Source("w2", 256)


@pytest.mark.parametrize(("more", "named"), [(LEAST_GAIN_TOKENS, True), (LEAST_GAIN_TOKENS - 16, False)])
def test_a_peer_must_hold_clearly_more(more: int, named: bool) -> None:
    found = best_source(PULLER, [PULLER, NEAR], {"w0": Reuse(32, 32), "w1": Reuse(64 + more)})
    assert (found is not None) == named


def test_of_equals_the_device_comes_before_the_tiers_and_the_idle_before_the_busy() -> None:
    reuse = {"w1": Reuse(128, 128), "w2": Reuse(256)}
    assert best_source(PULLER, [NEAR, FAR], reuse) == Source("w2", 256)
    busy = replace(FAR, pending_prefill_tokens=1000)
    assert best_source(PULLER, [busy, NEAR], {"w1": Reuse(256), "w2": Reuse(256)}) == Source("w1", 256)


@pytest.mark.parametrize(
    "change", [{"ready": False}, {"stalled": True}, {"identity": b"other"}, {"transports": ("inproc",)}]
)
def test_a_peer_that_cannot_lend_is_not_named(change: dict[str, object]) -> None:
    peer = replace(NEAR, **change)  # type: ignore[arg-type]
    assert best_source(PULLER, [PULLER, peer], {"w1": Reuse(4096)}) is None


def test_what_a_worker_would_pull_is_priced_by_what_its_pulls_from_that_peer_took() -> None:
    reuse = {"w0": Reuse(32, 32, 3.0), "w1": Reuse(512)}
    prices = {"w0": KvPrices(peers={"w1": 0.25, "w2": 0.5}), "w1": NOTHING_MEASURED, "w2": KvPrices(peers={"w0": 0.5})}
    found = with_pulls([PULLER, NEAR, FAR], reuse, prices)
    assert found["w0"] == Reuse(32, 32, 3.0 + 448 * 0.25, 448, "w1")
    assert found["w1"] == reuse["w1"]
    assert found["w2"] == Reuse(0, 0, 512 * 0.5, 512, "w1")  # of the mean of its other peers


@pytest.mark.parametrize("peers", [{}, {"w1": 1.0}])
def test_what_was_never_pulled_or_not_faster_than_computing_is_taken_to_be_computed(peers: dict[str, float]) -> None:
    found = with_pulls([PULLER, NEAR], {"w1": Reuse(512)}, {"w0": KvPrices(peers=peers), "w1": NOTHING_MEASURED})
    assert found.get("w0", NO_REUSE) == NO_REUSE


def test_the_price_of_a_pull_is_its_time_per_page_against_that_of_computing_one() -> None:
    speeds = [worker_pb2.PullSpeed(worker_id="w1", page_us=800), worker_pb2.PullSpeed(worker_id="w2", page_us=1e6)]
    loads = worker_pb2.TierLoads(pull_speeds=speeds)
    prices = prices_of(worker_pb2.LoadReport(prefill_token_us=100, loads=loads), 32)
    assert prices.peers == {"w1": pytest.approx(0.25), "w2": 1.0}
    assert prices_of(worker_pb2.LoadReport(loads=loads), 32).peers == {}


@pytest.mark.parametrize(("page_us", "told"), [(1600.0, True), (0.0, False)])
async def test_the_decision_tells_what_a_candidate_would_pull(page_us: float, told: bool) -> None:
    prompt = PROMPT * 20
    async with cluster() as twin:
        for name, role in (("p0", PREFILL), ("p1", PREFILL), ("d0", DECODE)):
            await twin.add(PullingTwin(twin.by_address, name, (role,), {"d0": page_us} if page_us else {}))
        tell_kv(twin.workers["d0"], 1, worker_pb2.KvEvent(kind=CLEARED), stored(prompt))
        await twin.until(lambda: bool(units(twin, "d0")), "d0's events came")
        await twin.collect(replace(asked(3, prompt=prompt), request_id="pulls"))
        timeline = twin.desk.request("pulls")
        assert timeline is not None
        held = len(chain_hashes(b"i" * 32, prompt)) // 32 * 16
        best = timeline.decisions[0].candidates[0]
        assert (best.pulled_tokens, best.peer) == ((held, "d0") if told else (0, ""))
        assert bool(best.terms["load"]) == told
        assert (best.terms["prefill"] < 0.05) == told


async def test_the_hint_goes_with_the_work_to_the_worker_that_computes() -> None:
    prompt = PROMPT * 20
    async with cluster() as twin:
        await twin.square()
        tell_kv(twin.workers["d0"], 1, worker_pb2.KvEvent(kind=CLEARED), stored(prompt))
        await twin.until(lambda: bool(units(twin, "d0")), "d0's events came")
        await twin.collect(asked(3, prompt=prompt))
        prefills = [
            c.prefill for w in twin.workers.values() for c in w.commands if c.WhichOneof("command") == "prefill"
        ]
        held = len(chain_hashes(b"i" * 32, prompt)) // 32 * 16
        address = twin.workers["d0"].address
        assert [prefill.work.source for prefill in prefills] == [
            worker_pb2.KvSource(worker_id="d0", address=address, tokens=held)
        ]


async def test_prompts_whose_logprobs_are_asked_for_are_computed_without_a_hint() -> None:
    prompt = PROMPT * 20
    async with cluster() as twin:
        await twin.square()
        tell_kv(twin.workers["d0"], 1, worker_pb2.KvEvent(kind=CLEARED), stored(prompt))
        await twin.until(lambda: bool(units(twin, "d0")), "d0's events came")
        request = asked(3, prompt=prompt)
        await twin.collect(replace(request, sampling=replace(request.sampling, prompt_logprobs=1)))
        works = [
            c.prefill.work if c.WhichOneof("command") == "prefill" else c.generate.work
            for w in twin.workers.values()
            for c in w.commands
            if c.WhichOneof("command") in ("prefill", "generate")
        ]
        assert works
        assert not any(work.HasField("source") for work in works)
