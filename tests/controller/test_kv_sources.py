"""A worker is told of the one peer that holds clearly more of its prompt, and only of one that it can reach."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.kv_sources import LEAST_GAIN_TOKENS, Source, best_source
from controller.placement.snapshot import Reuse
from kv_transfer.keys import chain_hashes
from pdserve.v1 import worker_pb2
from tests.controller.cluster_twin import PROMPT, asked, cluster
from tests.controller.placement.test_place import worker
from tests.controller.test_kv_routing import CLEARED, stored, tell_kv, units

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
