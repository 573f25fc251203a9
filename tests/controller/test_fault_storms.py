"""Seeded storms: random requests under random faults, each seed a schedule of its own. Tokens never differ, nothing is left."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from controller.request import GenerationRequest
from pdserve.errors import RequestQuarantined
from tests.controller.cluster_twin import PROMPT, ClusterTwin, Got, asked, cluster
from tests.controller.twin_faults import Faults
from tests.controller.twin_tokens import tokens_of
from tests.controller.worker_twin import DECODE, PREFILL, WorkerTwin

ROLES = {"p0": (PREFILL,), "p1": (PREFILL,), "d0": (DECODE,), "d1": (DECODE,), "b0": (PREFILL, DECODE)}


def annoy(worker: WorkerTwin, rng: Random) -> None:
    """One more fault; those that kill or break are used up."""
    worker.faults = Faults(
        refuse_reserves=rng.choice([0, 0, 2]),
        fail_prefills=rng.choice([0, 0, 1]),
        fail_reason=rng.choice(["transfer_failed", "no_capacity", "kv_corrupt", "lease_expired"]),
        duplicate=rng.random() < 0.3,
        reorder=rng.random() < 0.3,
        hold_first_token_s=rng.choice([0, 0, 0.02]),
        swallow_activation_report=rng.random() < 0.2,
        reset_after_tokens=rng.choice([None, None, 50]),
    )


async def storm(twin: ClusterTwin, rng: Random) -> None:
    """Of those that prefill only one dies, once: a request whose prefill saw two deaths is quarantined by design."""
    mortal = ["d0", "d1", rng.choice(["p0", "b0"])]
    for _ in range(6):
        await asyncio.sleep(rng.random() * 0.1)
        name = rng.choice(sorted(ROLES))
        if rng.random() < 0.6 and name in mortal:
            if name[0] != "d":
                mortal.remove(name)
            await twin.workers[name].kill()
            await twin.until(lambda n=name: twin.state(n) == "GONE", "gone")  # type: ignore[misc]
            await twin.add(twin.twin(name, *ROLES[name]))
        else:
            annoy(twin.workers[name], rng)
    for worker in twin.workers.values():
        worker.faults = Faults()


async def client(twin: ClusterTwin, rng: Random) -> tuple[GenerationRequest, Got]:
    """Reads to the end, or leaves somewhere on the way."""
    request = asked(rng.choice([1, 2, 30, 150]), n=rng.choice([1, 1, 3]), seed=rng.randrange(1000))
    patience = rng.choice([10**6, 10**6, rng.randrange(1, 40)])
    await asyncio.sleep(rng.random() * 0.3)
    got, stream = Got(), twin.service.generate(request)
    async for item in stream:
        got.add(item)
        if got.count >= patience:
            break
    await stream.aclose()  # type: ignore[attr-defined]
    return request, got


@pytest.mark.parametrize("seed", range(8))
async def test_a_storm_changes_no_token_and_leaves_nothing(seed: int) -> None:
    rng = Random(seed)
    async with cluster(grace_s=10) as twin:
        for name, roles in ROLES.items():
            await twin.add(twin.twin(name, *roles))
        clients = [asyncio.create_task(client(twin, Random(rng.random()))) for _ in range(30)]
        await storm(twin, rng)
        for request, got in await asyncio.gather(*clients):
            for choice, ids in got.token_ids.items():
                whole = tokens_of(PROMPT, request.sampling.seed, choice, request.sampling.max_tokens)
                assert ids == whole[: len(ids)]
                assert choice not in got.finish or len(ids) == len(whole)
        await twin.until(twin.idle, "idle")


POISON = b"poison!!"
PREFILLERS = ("p0", "p1")


async def grave_digger(twin: ClusterTwin, slots: int) -> None:
    """What a supervisor does: whoever died is started again, and would die of the same prompt."""
    while True:
        for name in PREFILLERS:
            if twin.state(name) == "GONE":
                worker = twin.twin(name, PREFILL, slots=slots)
                worker.faults.poison = POISON
                await twin.add(worker)
        await asyncio.sleep(0.01)


async def answered(twin: ClusterTwin, number: int, n: int) -> None:
    prompt = PROMPT + number.to_bytes(4, "little")
    got = await twin.collect(asked(10, prompt=prompt, n=n))
    assert got.token_ids == {choice: tokens_of(prompt, 3, choice, 10) for choice in range(n)}


@pytest.mark.parametrize("seed", range(8))
async def test_poison_kills_two_workers_and_takes_no_innocent_prompt_along(seed: int) -> None:
    """Innocent prompts wait and are computed beside it at both deaths, and are answered all the same."""
    rng, slots = Random(seed), 3
    async with cluster(grace_s=20, queue_timeout_s=30.0) as twin:
        for name in PREFILLERS:
            worker = await twin.add(twin.twin(name, PREFILL, slots=slots, step_s=0.02))
            worker.faults.poison = POISON
        for name in ("d0", "d1"):
            await twin.add(twin.twin(name, DECODE))
        digging = asyncio.create_task(grave_digger(twin, slots))
        poison = asked(10, prompt=POISON + PROMPT)
        works = [answered(twin, number, rng.choice([1, 1, 2])) for number in range(40)]
        works.insert(rng.randrange(30), refused(twin, poison))
        await asyncio.gather(*works)
        digging.cancel()
        timeline = twin.desk.request(poison.request_id)
        assert timeline is not None
        assert [attempt.outcome for attempt in timeline.attempts] == ["lost", "failed"]
        await twin.until(twin.idle, "idle")


async def refused(twin: ClusterTwin, request: GenerationRequest) -> None:
    with pytest.raises(RequestQuarantined):
        await twin.collect(request)
