"""Processes of a benchmark: started with a log, watched, measured, and ended with their children."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.processes import started, wait_for


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
