"""Clients that leave at every stage: nothing leaks in any process."""

from __future__ import annotations

import asyncio
import random

import httpx
import pytest

from tests.e2e.cluster import Cluster, wait_until
from tests.e2e.streams import events

pytestmark = pytest.mark.slow

REQUESTS = 1000
CONCURRENT = 32


async def _leave_early(client: httpx.AsyncClient, rng: random.Random, gate: asyncio.Semaphore) -> None:
    length = rng.choice([3, 40, 200, 700])
    body: dict[str, object] = {
        "prompt": [rng.randrange(10, 1000) for _ in range(length)],
        "max_tokens": rng.choice([1, 4, 16]),
        "n": rng.choice([1, 1, 1, 3]),
        "ignore_eos": True,
    }
    patience_s = rng.choice([0.001, 0.01, 0.05, 0.2, 1.0, 30.0])
    async with gate:
        try:
            async with asyncio.timeout(patience_s):
                async for _ in events(client, body):
                    pass
        except TimeoutError:
            return


def _all_free(cluster: Cluster) -> bool:
    return all(
        worker.running == 0
        and worker.waiting == 0
        and worker.blocks_leaked == 0
        and worker.blocks_free == worker.blocks_total
        for worker in cluster.workers().values()
    )


async def test_a_thousand_requests_with_random_cancels_leak_no_block(pair_cluster: Cluster) -> None:
    await asyncio.to_thread(wait_until, lambda: _all_free(pair_cluster), "every block free")
    rng, gate = random.Random(20261121), asyncio.Semaphore(CONCURRENT)
    limits = httpx.Limits(max_connections=CONCURRENT)
    client = httpx.AsyncClient(base_url=pair_cluster.api_url, timeout=120, limits=limits)
    async with client, asyncio.TaskGroup() as group:
        for _ in range(REQUESTS):
            group.create_task(_leave_early(client, rng, gate))
    await asyncio.to_thread(wait_until, lambda: _all_free(pair_cluster), "every block free again")
