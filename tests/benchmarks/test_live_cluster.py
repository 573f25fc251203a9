"""The cluster of a benchmark ends with the benchmark, however that one ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pdserve.local_process import LocalProcess, children_of, local_process, wait_gone
from tests.child_processes import killed_after, tied
from tests.e2e.cluster import SMALL_SETTINGS

pytestmark = pytest.mark.slow  # real clusters

ROOT = Path(__file__).parents[2]
START_S = 180.0
END_S = 90.0
BENCHMARK = """
import json, sys, tempfile, time
from pathlib import Path
from benchmarks.command import benchmark_parser
from benchmarks.live_cluster import live_cluster
from pdserve.cli.cluster_state import read_state
benchmark_parser("stands in for a benchmark")
with tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder, live_cluster(Path(folder) / "state", sys.argv[2:]) as cluster:
    state = read_state(cluster.state_dir)
    print(json.dumps([one.pid for one in state.pids()]), flush=True)
    time.sleep(600)
"""
FLAGS = ("--prefill", "0", "--decode", "0", "--both", "1")


@contextmanager
def running_benchmark(folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[LocalProcess]]]:
    """A process that holds a live cluster, and all processes of that cluster."""
    sets = [word for setting in SMALL_SETTINGS for word in ("--set", setting)]
    command = tied([sys.executable, "-c", BENCHMARK, str(folder), *FLAGS, *sets])
    benchmark = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with benchmark, killed_after(benchmark, START_S):
        assert benchmark.stdout is not None
        served = [local_process(pid) for pid in json.loads(benchmark.stdout.readline())]
        everything = [*served, *children_of(served), *children_of([local_process(benchmark.pid)])]
        assert len(everything) >= 5, "pdserve up, the supervisor, the controller, a worker and its engine"
        assert all(process.alive() for process in everything)
        yield benchmark, everything


def test_a_killed_benchmark_leaves_no_process_of_its_cluster(tmp_path: Path) -> None:
    with running_benchmark(tmp_path) as (benchmark, everything):
        benchmark.kill()
        assert wait_gone(everything, END_S) == []


def test_a_benchmark_told_to_end_leaves_neither_process_nor_folder(tmp_path: Path) -> None:
    with running_benchmark(tmp_path) as (benchmark, everything):
        benchmark.send_signal(signal.SIGTERM)
        assert benchmark.wait(END_S) == 128 + signal.SIGTERM
        assert wait_gone(everything, END_S) == []
    assert list(tmp_path.iterdir()) == []
