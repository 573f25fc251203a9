"""Owns a real cluster of a benchmark: `pdserve up`, its API, the end of all its processes, `pdserve down`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pdserve.cli.cluster_state import read_state
from pdserve.local_process import children_of, wait_gone

START_S = 180.0
REQUEST_S = 120.0
KILL_S = 10.0
PDSERVE = str(Path(sys.executable).with_name("pdserve"))


@dataclass(frozen=True, slots=True)
class LiveCluster:
    """url: of its HTTP API."""

    url: str
    state_dir: Path

    def get(self, path: str) -> dict[str, object]:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=REQUEST_S) as answer:
            return _record(answer.read())

    def post(self, path: str, body: dict[str, object]) -> dict[str, object]:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=REQUEST_S) as answer:
            return _record(answer.read())

    def kill_everything(self) -> None:
        """SIGKILL for every process of it, the supervisor first, so that it restarts none."""
        state = read_state(self.state_dir)
        assert state is not None
        everything = [*state.pids(), *children_of(state.pids())]
        for process in everything:
            process.send(signal.SIGKILL)
        wait_gone(everything, KILL_S)


@contextmanager
def live_cluster(state_dir: Path, flags: Sequence[str]) -> Iterator[LiveCluster]:
    """A running cluster on a free port; what it keeps on disk stays in `state_dir`."""
    place = ("--state-dir", str(state_dir))
    try:
        command = (PDSERVE, "up", *place, "--detach", "-o", "json", "--port", "0", *flags)
        answer = subprocess.run(command, check=False, capture_output=True, text=True, timeout=START_S)
        if answer.returncode:
            raise RuntimeError(f"pdserve up failed ({answer.returncode}): {answer.stdout}{answer.stderr}")
        yield LiveCluster(str(json.loads(answer.stdout)["api_url"]), state_dir)
    finally:
        subprocess.run((PDSERVE, "down", *place), check=False, capture_output=True, timeout=START_S)


def _record(text: bytes) -> dict[str, object]:
    decoded = json.loads(text)
    assert isinstance(decoded, dict)
    return decoded
