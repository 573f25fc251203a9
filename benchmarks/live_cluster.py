"""Owns a real cluster of a benchmark: `pdserve up`, its API, the end of all its processes.

`up` watches its standard input, whose other end is here: the cluster ends with the benchmark, also where that one is killed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pdserve.cli.cluster_state import read_state
from pdserve.local_process import children_of, wait_gone

REQUEST_S = 120.0
END_S = 60.0  # longer than workers drain
KILL_S = 10.0
PDSERVE = str(Path(sys.executable).with_name("pdserve"))


@dataclass(frozen=True, slots=True)
class LiveCluster:
    """url: of its HTTP API. ready_s: from the start of `pdserve up` until a first request was answered."""

    url: str
    state_dir: Path
    ready_s: float

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
    command = (PDSERVE, "up", "--state-dir", str(state_dir), "--while-stdin", "-o", "json", "--port", "0", *flags)
    start_s = time.monotonic()
    with tempfile.TemporaryFile() as said:
        up = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said)
        try:
            yield LiveCluster(_url_of(up, said), state_dir, time.monotonic() - start_s)
        finally:
            _end(up)


def _url_of(up: subprocess.Popen[bytes], said: IO[bytes]) -> str:
    """Raises RuntimeError with what `up` said where it did not come up. It has deadlines for every part of the start."""
    assert up.stdout is not None
    line = up.stdout.readline()
    answer = _record(line) if line else {}
    if "api_url" not in answer:
        said.seek(0)
        raise RuntimeError(f"pdserve up failed: {line.decode()}{said.read().decode(errors='replace')[-4000:]}")
    return str(answer["api_url"])


def _end(up: subprocess.Popen[bytes]) -> None:
    """By the end of its input, on which it drains and ends; by force where that takes too long."""
    for pipe in (up.stdin, up.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
    try:
        up.wait(END_S)
    except subprocess.TimeoutExpired:
        up.kill()  # its processes are tied to its life
        up.wait()


def _record(text: bytes) -> dict[str, object]:
    decoded = json.loads(text)
    assert isinstance(decoded, dict)
    return decoded
