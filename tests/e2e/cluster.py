"""Owns a real cluster for the tests: `pdserve up --detach`, its status, its processes, `pdserve down`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.child_processes import end, tied, when_we_end

PDSERVE = str(Path(sys.executable).parent / "pdserve")
START_DEADLINE_S = 180.0
STOP_DEADLINE_S = 120.0  # longer than `down` drains and kills
# Many clusters run side by side: pools that are shares of the free memory would find none left, and a worker that gets no turn
# for a second is not lost. One that is killed is seen by its connection, and takes as long as it takes to come back.
SMALL_SETTINGS = (
    "store.host_bytes=33554432",
    "engine.kv_bytes=134217728",
    "worker.heartbeat_misses=20",
    "transfer.heartbeat_misses=20",
    "transfer.connect_s=30",
    "controller.no_worker_grace_s=120",
    "controller.queue_timeout_s=120",
)
SMALL = tuple(part for setting in SMALL_SETTINGS for part in ("--set", setting))
COMMAND_S = 180.0


@dataclass(frozen=True, slots=True)
class Worker:
    worker_id: str
    roles: tuple[str, ...]
    state: str
    pid: int
    engine_pid: int
    blocks_total: int
    blocks_free: int
    blocks_leaked: int
    running: int
    waiting: int
    dispatches: int  # as the controller knows at this moment; the other figures are those of the last heartbeat


def run_cli(state_dir: Path, *args: str, timeout_s: float = START_DEADLINE_S) -> subprocess.CompletedProcess[str]:
    """Runs `pdserve COMMAND … --state-dir S`, the command first."""
    command = [PDSERVE, args[0], "--state-dir", str(state_dir), *args[1:]]
    return subprocess.run(tied(command), capture_output=True, text=True, timeout=timeout_s, check=False)


class Cluster:
    """A running cluster. Ends with `stop`, whatever happened to its parts; and with this process, if that comes first."""

    def __init__(self, state_dir: Path, *flags: str) -> None:
        self.state_dir = state_dir
        self._keeper = when_we_end([PDSERVE, "down", "--now", "--state-dir", str(state_dir)])
        answer = run_cli(state_dir, "up", "--detach", "-o", "json", "--port", "0", *SMALL, *flags)
        if answer.returncode != 0:
            logs = "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in state_dir.glob("logs/*"))
            self._end()
            raise RuntimeError(f"up failed ({answer.returncode}): {answer.stdout}{answer.stderr}\n{logs}")
        self.api_url = str(self.status()["api_url"])

    def status(self) -> dict[str, object]:
        answer = run_cli(self.state_dir, "status", "-o", "json", timeout_s=COMMAND_S)
        if answer.returncode != 0:
            raise RuntimeError(f"status failed ({answer.returncode}): {answer.stdout}{answer.stderr}")
        status = json.loads(answer.stdout)
        assert isinstance(status, dict)
        return status

    def workers(self) -> dict[str, Worker]:
        """Workers by id, straight from the operator API."""
        rows = httpx.get(f"{self.api_url}/api/v1/status", timeout=30).json()["workers"]
        return {
            row["id"]: Worker(
                row["id"], tuple(row["roles"]), row["state"], row["pid"], row["engine_pid"], row["blocks_total"],
                row["blocks_free"], row["blocks_leaked"], row["running"], row["waiting"], row["dispatches"],
            )
            for row in rows
        }  # fmt: skip

    def ready(self, count: int) -> bool:
        return sum(worker.state == "READY" for worker in self.workers().values()) == count

    def stop(self) -> None:
        answer = self._end()
        assert answer.returncode == 0, answer.stdout + answer.stderr

    def _end(self) -> subprocess.CompletedProcess[str]:
        answer = run_cli(self.state_dir, "down", timeout_s=STOP_DEADLINE_S)
        end(self._keeper)
        return answer


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = START_DEADLINE_S) -> None:
    """Polls `condition`; fails with `what` after the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s} s: {what}")
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """True for a live process that is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
