"""A real cluster whose engines are bound to cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster

pytestmark = pytest.mark.slow


def _cores_of_threads(pid: int) -> frozenset[frozenset[int]]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return frozenset(frozenset(os.sched_getaffinity(int(thread.name))) for thread in threads)


def test_up_gives_each_engine_its_part_of_the_listed_cores_and_keeps_the_rest_off_them(
    tmp_path: Path,
) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    first, second = allowed[0], allowed[-1]
    listed = f"engine.cores={first},{second}" if first != second else "engine.cores=none"
    cluster = Cluster(tmp_path / "state", "--prefill", "1", "--decode", "1", "--set", listed)
    try:
        workers = cluster.workers()
        assert os.sched_getaffinity(workers["p0"].engine_pid) == {first}
        assert os.sched_getaffinity(workers["d0"].engine_pid) == {second}
        others = set(allowed) - {first, second}
        services = [worker.pid for worker in workers.values()] + [int(str(cluster.status()["pid"]))]
        wanted = frozenset(others if len(others) >= len(workers) else allowed)
        assert {_cores_of_threads(pid) for pid in services} == {frozenset({wanted})}
    finally:
        cluster.stop()
