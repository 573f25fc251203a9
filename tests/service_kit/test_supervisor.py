"""The supervisor with real processes: restarts, order of the end, locks, no orphan."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pdserve.errors import Unavailable
from pdserve.local_process import LocalProcess, end_all, local_process, wait_gone
from service_kit.cluster_files import ClusterFiles
from service_kit.config import ClusterConfig, PoolConfig
from service_kit.ports import choose_port
from service_kit.process import ProcessSpec
from service_kit.process_table import process_table
from service_kit.restart_policy import RestartPolicy
from service_kit.supervisor import Addresses, Supervisor, effective_config
from tests.child_processes import end, tied

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE_S = 60.0


@dataclass(slots=True)
class Run:
    """One supervisor of stand-ins."""

    state_dir: Path
    popen: subprocess.Popen[bytes]

    def row(self, name: str) -> dict[str, object]:
        try:
            record = json.loads((self.state_dir / "cluster.json").read_text())
        except FileNotFoundError:
            return {"pid": 0, "restarts": -1, "state": "ABSENT"}
        row = next(row for row in record["processes"] if row["name"] == name)
        assert isinstance(row, dict)
        return row

    def pid(self, name: str) -> int:
        """Waits for the process to run, i.e. to have marked its start."""
        wait_for(lambda: self.row(name)["pid"] != 0, f"{name} has a pid")
        pid = self.row(name)["pid"]
        assert isinstance(pid, int)
        wait_for(lambda: f"started {pid}" in self.marks(), f"{name} started")
        return pid

    def marks(self) -> list[str]:
        path = self.state_dir / "marks"
        return path.read_text().splitlines() if path.exists() else []

    def wait(self) -> int:
        return self.popen.wait(DEADLINE_S)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.01)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def _start(**kinds: str) -> Run:
        table = {name: [kind, str(tmp_path / "marks")] for name, kind in kinds.items()}
        command = [sys.executable, "-m", "tests.service_kit.stand_in_cluster", str(tmp_path), json.dumps(table)]
        runs.append(Run(tmp_path, subprocess.Popen(tied(command), cwd=ROOT, stderr=subprocess.DEVNULL)))
        return runs[-1]

    yield _start
    for run in runs:
        end(run.popen)
    started = [int(line.split()[1]) for run in runs for line in run.marks() if line.startswith("started")]
    assert end_all([LocalProcess(pid, 0) for pid in started], 5.0) == []


def test_a_process_that_dies_is_restarted_and_its_death_is_told(start: Callable[..., Run]) -> None:
    run = start(controller="polite", p0="polite")
    first = run.pid("p0")
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: run.row("p0")["restarts"] == 1, "restarted")
    assert run.pid("p0") != first
    assert run.row("p0")["last_exit"] == -signal.SIGKILL
    assert run.row("controller")["restarts"] == 0


def test_a_process_that_dies_at_once_is_tried_again_and_again(start: Callable[..., Run]) -> None:
    run = start(controller="polite", p0="dying")
    wait_for(lambda: sum(line.startswith("started") for line in run.marks()) >= 4, "four starts")
    assert run.row("p0")["last_exit"] == 7
    assert "output of dying" in (run.state_dir / "logs" / "p0.log").read_text()


def test_sigterm_ends_the_controller_first_then_the_workers_and_leaves_no_file(start: Callable[..., Run]) -> None:
    run = start(p0="polite", controller="polite", d0="polite")
    pids = {name: run.pid(name) for name in ("controller", "p0", "d0")}
    run.popen.terminate()
    assert run.wait() == 0
    ended = [line for line in run.marks() if not line.startswith("started")]
    assert ended[:2] == [f"asked {pids['controller']}", f"ended {pids['controller']}"]
    assert set(ended[2:]) == {f"{what} {pids[name]}" for what in ("asked", "ended") for name in ("p0", "d0")}
    assert not (run.state_dir / "cluster.json").exists()


def test_a_second_sigterm_kills_a_process_that_does_not_drain(start: Callable[..., Run]) -> None:
    run = start(controller="deaf", p0="polite")
    controller, worker = run.pid("controller"), run.pid("p0")
    run.popen.terminate()
    wait_for(lambda: f"asked {controller}" in run.marks(), "the controller was asked")
    assert run.popen.poll() is None
    run.popen.terminate()
    assert run.wait() == 0
    assert not any(LocalProcess(pid, 0).alive() for pid in (controller, worker))


def test_a_killed_supervisor_leaves_no_process(start: Callable[..., Run]) -> None:
    run = start(controller="polite", p0="deaf", d0="polite")
    children = [local_process(run.pid(name)) for name in ("controller", "p0", "d0")]
    run.popen.kill()
    assert wait_gone(children, DEADLINE_S) == []


def test_a_second_supervisor_of_a_state_directory_is_refused(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start(controller="polite")
    run.pid("controller")
    with pytest.raises(Unavailable, match="runs already"):
        ClusterFiles(tmp_path).lock()
    run.popen.terminate()
    assert run.wait() == 0
    ClusterFiles(tmp_path).lock()


async def test_a_program_that_cannot_be_executed_is_retried_not_fatal(tmp_path: Path) -> None:
    files = ClusterFiles(tmp_path)
    files.lock()
    table = (ProcessSpec("p0", ("/nonexistent/program",)),)
    supervisor = Supervisor(table, RestartPolicy(0.01, 0.02), files, Addresses(ClusterConfig()), 1.0)
    running = asyncio.create_task(supervisor.run())
    path = tmp_path / "cluster.json"
    await asyncio.to_thread(
        wait_for, lambda: path.exists() and json.loads(path.read_text())["processes"][0]["restarts"] >= 2, "retried"
    )
    supervisor.stop()
    async with asyncio.timeout(DEADLINE_S):
        await running


def test_the_table_names_every_worker_and_its_roles() -> None:
    pool = PoolConfig(prefill=2, decode=1, both=1)
    table = process_table(pool, Path("/s/config.json"), "python", ((0, 1), (2, 3), (), ()), ())
    assert [spec.name for spec in table] == ["controller", "p0", "p1", "d0", "b0"]
    assert table[0].command == ("python", "-m", "controller", "--config", "/s/config.json")
    assert table[2].command[-5:] == ("p1", "--roles", "prefill", "--set", "engine.cores=2,3")
    assert table[4].command[-3:] == ("b0", "--roles", "prefill,decode")
    kept = process_table(pool, Path("/s/config.json"), "python", ((),) * 4, (0, 3))
    assert {spec.command[5:7] for spec in kept} == {("--set", "pool.service_cores=0,3")}


def test_a_taken_port_is_replaced_and_the_children_get_both_addresses() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert choose_port("127.0.0.1", port) != port
    addresses = Addresses(ClusterConfig())
    config = effective_config(ClusterConfig(), addresses, Path("/s"))
    assert config.controller.grpc_port == addresses.grpc_port != config.controller.port == addresses.http_port
    assert config.controllers == (addresses.grpc_address,)
