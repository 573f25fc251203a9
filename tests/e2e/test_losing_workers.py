"""SIGKILL of real processes: the streamed token ids equal those of an undisturbed run."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from tests.e2e.cluster import Cluster, Worker, kill, wait_until
from tests.e2e.streams import Streamed, complete, events, fold

pytestmark = pytest.mark.slow

BODIES: dict[str, dict[str, object]] = {
    "greedy": {"prompt": "import os\n\n\ndef walk(top):\n", "max_tokens": 300, "temperature": 0, "ignore_eos": True},
    "seeded n=2 with logprobs": {
        "prompt": "class Reader:\n", "max_tokens": 200, "temperature": 0.8, "seed": 5, "n": 2, "logprobs": 1, "ignore_eos": True,
    },
}  # fmt: skip


def _route(cluster: Cluster, request_id: str) -> tuple[str, str]:
    """(prefill worker, decode worker) of the last attempt."""
    record = httpx.get(f"{cluster.api_url}/api/v1/requests/{request_id}", timeout=10).json()
    decision = record["decisions"][-1]
    return decision["picked"]["prefill_worker"], decision["picked"]["decode_worker"]


def _pid(worker: Worker, process: str) -> int:
    return worker.pid if process == "io" else worker.engine_pid


async def _kill_decode_mid_stream(cluster: Cluster, body: dict[str, object], process: str, tag: str) -> Streamed:
    streamed, killed = Streamed(), False
    async with httpx.AsyncClient(base_url=cluster.api_url, timeout=60, headers={"x-request-id": tag}) as client:
        async for event in events(client, body):
            fold(streamed, event)
            if not killed and sum(map(len, streamed.token_ids.values())) >= 20:
                killed = True
                decode_worker = _route(cluster, tag)[1]
                kill(_pid(cluster.workers()[decode_worker], process))
    assert killed
    return streamed


@pytest.mark.parametrize("process", ["io", "engine"])
@pytest.mark.parametrize("kind", sorted(BODIES))
async def test_a_stream_survives_the_death_of_its_decode_worker(
    square_cluster: Cluster, kind: str, process: str
) -> None:
    async with httpx.AsyncClient(base_url=square_cluster.api_url, timeout=60) as client:
        undisturbed = await complete(client, BODIES[kind])
    streamed = await _kill_decode_mid_stream(square_cluster, BODIES[kind], process, f"kill-{time.monotonic_ns()}")
    assert streamed.error == ""
    assert streamed.token_ids == undisturbed.token_ids
    assert streamed.text == undisturbed.text
    assert streamed.done


@pytest.mark.parametrize("process", ["io", "engine"])
async def test_requests_survive_the_death_of_a_prefill_worker(square_cluster: Cluster, process: str) -> None:
    """Many long prompts are in prefill and transfer when one of the two prefill workers dies."""
    wait_until(lambda: square_cluster.ready(4), "four workers ready")
    bodies: list[dict[str, object]] = [
        {
            "prompt": [(7 * i + j) % 1000 + 10 for j in range(1500)],
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
        }
        for i in range(8)
    ]
    async with httpx.AsyncClient(base_url=square_cluster.api_url, timeout=120) as client:
        expected = [await complete(client, body) for body in bodies]
        cold = [{**body, "cache_salt": f"salt-{process}"} for body in bodies]
        tasks = [asyncio.create_task(complete(client, body)) for body in cold]
        await asyncio.to_thread(wait_until, lambda: _prefilling(square_cluster), "a prefill worker at work", 30)
        victim = next(w for w in square_cluster.workers().values() if w.roles == ("prefill",) and w.running + w.waiting)
        kill(_pid(victim, process))
        got = await asyncio.gather(*tasks)
    assert [one.error for one in got] == [""] * len(got)
    assert [one.token_ids for one in got] == [one.token_ids for one in expected]


def _prefilling(cluster: Cluster) -> bool:
    return any(w.roles == ("prefill",) and w.running + w.waiting > 0 for w in cluster.workers().values())


async def test_with_no_worker_left_the_answer_is_503_and_the_cluster_heals(square_cluster: Cluster) -> None:
    for worker in square_cluster.workers().values():
        kill(worker.pid)
    async with httpx.AsyncClient(base_url=square_cluster.api_url, timeout=60) as client:
        began = time.monotonic()
        answer = await client.post("/v1/completions", json={"prompt": "import", "max_tokens": 1})
        if answer.status_code != 200:  # else the supervisor was quicker
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert time.monotonic() - began < 10
        await asyncio.to_thread(wait_until, lambda: square_cluster.ready(4), "four workers ready again", 90)
        assert (await client.post("/v1/completions", json={"prompt": "import", "max_tokens": 1})).status_code == 200
