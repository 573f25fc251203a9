"""A real cluster whose controller or supervisor is killed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pdserve.client import AsyncClient, Sampling
from tests.e2e.cluster import Cluster, alive, kill, wait_until

pytestmark = pytest.mark.slow

PROMPT = "def read_lines(path):\n"


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path / "state", "--prefill", "1", "--decode", "1")
    yield cluster
    cluster.stop()


def _supervisor_pid(cluster: Cluster) -> int:
    return int(json.loads((cluster.state_dir / "cluster.json").read_text())["supervisor_pid"])


async def _stream(address: str, sampling: Sampling, kill_at: int, controller_pid: int) -> list[int]:
    tokens: list[int] = []
    async with AsyncClient(address) as client:
        async for delta in client.generate(PROMPT, sampling, timeout_s=60.0):
            tokens += delta.token_ids
            if kill_at and len(tokens) >= kill_at:
                kill(controller_pid)
                kill_at = 0
    return tokens


async def test_a_stream_of_the_sdk_survives_the_death_of_the_controller(own_cluster: Cluster) -> None:
    status = own_cluster.status()
    address, pid = str(status["grpc_address"]), int(str(status["pid"]))
    sampling = Sampling(max_tokens=300, temperature=0.8, seed=11, ignore_eos=True)
    undisturbed = await _stream(address, sampling, 0, pid)
    began = time.monotonic()
    resumed = await _stream(address, sampling, 20, pid)
    assert resumed == undisturbed
    assert time.monotonic() - began < 60
    await asyncio.to_thread(wait_until, lambda: own_cluster.ready(2), "both workers registered again")
    assert int(str(own_cluster.status()["pid"])) != pid
    async with httpx.AsyncClient(base_url=own_cluster.api_url, timeout=30) as http:
        answer = await http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1})
    assert answer.status_code == 200


def test_a_killed_supervisor_leaves_no_process(own_cluster: Cluster) -> None:
    workers = own_cluster.workers().values()
    pids = [int(str(own_cluster.status()["pid"])), *(pid for w in workers for pid in (w.pid, w.engine_pid))]
    assert all(map(alive, pids))
    kill(_supervisor_pid(own_cluster))
    wait_until(lambda: not any(map(alive, pids)), "every process of the cluster ended", 15)
