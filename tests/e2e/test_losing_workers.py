"""SIGKILL of real processes: the streamed token ids equal those of an undisturbed run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pdserve.cli.record import Record
from tests.e2e.cluster import Cluster, Worker, kill, wait_until
from tests.e2e.streams import STREAM_S, Streamed, complete, events, fold

pytestmark = pytest.mark.slow

# Long enough that the decode worker is found and killed while it decodes, however busy the machine is.
BODIES: dict[str, dict[str, object]] = {
    "greedy": {"prompt": "import os\n\n\ndef walk(top):\n", "max_tokens": 900, "temperature": 0, "ignore_eos": True},
    "seeded n=2 with logprobs": {
        "prompt": "class Reader:\n", "max_tokens": 500, "temperature": 0.8, "seed": 5, "n": 2, "logprobs": 1, "ignore_eos": True,
    },
}  # fmt: skip


def _attempts(cluster: Cluster, request_id: str) -> list[Record]:
    answer = httpx.get(f"{cluster.api_url}/api/v1/requests/{request_id}", timeout=30)
    return Record.parse(answer.text).records("attempts")


def _pid(worker: Worker, process: str) -> int:
    return worker.pid if process == "io" else worker.engine_pid


async def _kill_decode_mid_stream(cluster: Cluster, body: dict[str, object], process: str, tag: str) -> Streamed:
    streamed, killed, workers = Streamed(), False, cluster.workers()
    async with httpx.AsyncClient(base_url=cluster.api_url, timeout=60) as client, asyncio.timeout(STREAM_S):
        async for event in events(client, body, tag):
            fold(streamed, event)
            if not killed and streamed.token_ids:
                killed = True  # at once: where cores are short, asking who decodes takes as long as a thousand tokens
                kill(_pid(workers[_attempts(cluster, tag)[-1].text("decode_worker")], process))
    attempts = _attempts(cluster, tag)
    assert len(attempts) > 1, "it was killed after the end"
    assert attempts[-1].integer("resumed_tokens") > 0
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
        for i in range(16)
    ]
    async with httpx.AsyncClient(base_url=square_cluster.api_url, timeout=120) as client:
        expected = await asyncio.gather(*(complete(client, body) for body in bodies))
        cold = [{**body, "cache_salt": f"salt-{process}"} for body in bodies]
        tags = [f"{time.monotonic_ns()}-{number}" for number in range(len(cold))]
        tasks = [asyncio.create_task(complete(client, *each)) for each in zip(cold, tags, strict=True)]
        victim = await asyncio.to_thread(_busy_prefill_worker, square_cluster)
        kill(_pid(victim, process))
        got = await asyncio.gather(*tasks)
        tried = [len(_attempts(square_cluster, tag)) for tag in tags]
    assert max(tried) > 1, "it was killed when all was done"
    assert [one.error for one in got] == [""] * len(got)
    assert [one.token_ids for one in got] == [one.token_ids for one in expected]


def _busy_prefill_worker(cluster: Cluster) -> Worker:
    """One that has several prompts to compute or to send at this moment."""
    found: list[Worker] = []

    def look() -> bool:
        found[:] = [one for one in cluster.workers().values() if one.roles == ("prefill",) and one.dispatches > 3]
        return bool(found)

    wait_until(look, "a prefill worker at work")
    return found[0]


@pytest.mark.parametrize("process", ["io", "engine"])
async def test_a_request_that_comes_while_all_workers_restart_waits_for_them(
    square_cluster: Cluster, process: str
) -> None:
    for worker in square_cluster.workers().values():
        kill(_pid(worker, process))
    async with httpx.AsyncClient(base_url=square_cluster.api_url, timeout=STREAM_S) as client:
        answer = await client.post("/v1/completions", json={"prompt": "import", "max_tokens": 1})
    assert answer.status_code == 200, answer.text


@pytest.fixture
def impatient_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Its controller waits less for a worker than the supervisor does before it starts one again."""
    impatience = ("--set", "controller.no_worker_grace_s=0.2")
    cluster = Cluster(tmp_path / "state", "--prefill", "1", "--decode", "1", *impatience)
    yield cluster
    cluster.stop()


def test_with_no_worker_left_the_answer_is_503_and_the_cluster_heals(impatient_cluster: Cluster) -> None:
    for worker in impatient_cluster.workers().values():
        kill(worker.pid)
    body = {"prompt": "import", "max_tokens": 1}
    with httpx.Client(base_url=impatient_cluster.api_url, timeout=60) as client:
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 503, answer.text
        assert int(answer.headers["retry-after"]) >= 1
        wait_until(lambda: impatient_cluster.ready(2), "both workers ready again")
        assert client.post("/v1/completions", json=body).status_code == 200
