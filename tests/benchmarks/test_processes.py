"""Processes of a benchmark: started with a log, watched, measured, and ended with their children."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.processes import started, wait_for
from pdserve.local_process import local_process, wait_gone
from tests.child_processes import killed_after, tied

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0


def test_a_process_is_ended_with_the_block(tmp_path: Path) -> None:
    with started("server", "http.server", ["--bind", "127.0.0.1", "0"], tmp_path) as running:
        wait_for("the server", lambda: running.cpu_s() > 0 or None, [running], 10.0)
        process = running.process
    assert not process.is_running()


def test_a_process_that_ends_while_it_is_waited_for_is_reported_with_its_log(tmp_path: Path) -> None:
    with (
        started("broken", "no_such_module", [], tmp_path) as running,
        pytest.raises(RuntimeError, match="no_such_module"),
    ):
        wait_for("never", lambda: None, [running], 10.0)


def test_a_wait_has_a_deadline() -> None:
    start_s = time.monotonic()
    with pytest.raises(TimeoutError, match="a miracle"):
        wait_for("a miracle", lambda: None, [], 0.2)
    assert time.monotonic() - start_s < 5


def test_an_unknown_benchmark_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["nonsense"])
    assert ended.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_what_a_benchmark_started_dies_with_it(tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from benchmarks.processes import started
with started("server", "http.server", ["--bind", "127.0.0.1", "0"], Path({str(tmp_path)!r})) as running:
    print(running.process.pid, flush=True)
    time.sleep(600)
"""
    benchmark = subprocess.Popen(tied([sys.executable, "-c", script]), stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with benchmark, killed_after(benchmark, DEADLINE_S):
        assert benchmark.stdout is not None
        child = local_process(int(benchmark.stdout.readline()))
        assert child.alive()
        benchmark.kill()
        assert wait_gone([child], DEADLINE_S) == []
