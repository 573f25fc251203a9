"""`pdserve up` in the foreground: Ctrl-C lets running requests end, twice stops at once; nothing is left over."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from pdserve.cli.cluster_state import running_state
from pdserve.local_process import LocalProcess, children_of
from tests.child_processes import end, tied
from tests.cli.test_commands import PDSERVE, run
from tests.e2e.cluster import SMALL

pytestmark = pytest.mark.slow

START_S, END_S = 180.0, 60.0


@dataclass(slots=True)
class Foreground:
    """`pdserve up` with a terminal's reader, as far as signals and output go."""

    state_dir: Path
    popen: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    came: threading.Condition = field(default_factory=threading.Condition)

    def read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            with self.came:
                self.lines.append(line)
                self.came.notify_all()

    def until(self, text: str, deadline_s: float) -> None:
        with self.came:
            found = self.came.wait_for(lambda: any(text in line for line in self.lines), deadline_s)
        assert found, f"{text!r} was never said:\n{''.join(self.lines)}"

    def processes(self) -> list[LocalProcess]:
        known = running_state(self.state_dir).pids()
        return [*known, *children_of(known[1:])]

    def interrupt(self) -> None:
        self.popen.send_signal(signal.SIGINT)


@pytest.fixture
def foreground(tmp_path: Path) -> Iterator[Foreground]:
    state_dir = tmp_path / "state"
    command = [PDSERVE, "up", "--port", "0", "--state-dir", str(state_dir), *SMALL]
    popen = subprocess.Popen(tied(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    running = Foreground(state_dir, popen)
    reader = threading.Thread(target=running.read, daemon=True)
    reader.start()
    try:
        running.until("Stop it: Ctrl-C", START_S)
        yield running
    finally:
        end(popen)
        reader.join(END_S)
        run("down", "--now", state_dir=state_dir)
        assert not reader.is_alive(), "somebody still holds the output of `pdserve up`"


def stream(api_url: str, max_tokens: int) -> Iterator[str]:
    body = {"prompt": "import os", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{api_url}/v1/completions", json=body, timeout=60) as response:
        yield from (line for line in response.iter_lines() if line)


def shared_memory(processes: list[LocalProcess]) -> set[Path]:
    """What they have mapped of it. Other tests' clusters come and go meanwhile."""
    lines = [line for one in processes for line in Path(f"/proc/{one.pid}/maps").read_text().splitlines()]
    return {Path(line.split(maxsplit=5)[5]) for line in lines if "/dev/shm/" in line}


def test_ctrl_c_lets_a_running_stream_end_and_leaves_nothing(foreground: Foreground) -> None:
    processes = foreground.processes()
    shared = shared_memory(processes)
    assert len(processes) == 2 + 2 * 2  # supervisor, controller, two workers of two processes
    lines = stream(running_state(foreground.state_dir).api_url, 300)
    next(lines)
    foreground.interrupt()
    foreground.until("running requests may end", END_S)
    assert list(lines)[-1] == "data: [DONE]"
    assert foreground.popen.wait(END_S) == 0
    foreground.until("nothing left over", END_S)
    assert not [one.pid for one in processes if one.alive()]
    assert not [path for path in shared if path.exists()]
    assert not (foreground.state_dir / "cluster.json").exists()


def test_ctrl_c_twice_stops_at_once(foreground: Foreground) -> None:
    processes = foreground.processes()
    lines = stream(running_state(foreground.state_dir).api_url, 1900)
    next(lines)
    foreground.interrupt()
    foreground.until("running requests may end", END_S)
    began_s = time.monotonic()
    foreground.interrupt()
    with pytest.raises(httpx.RemoteProtocolError):
        list(lines)
    assert foreground.popen.wait(END_S) == 0
    assert time.monotonic() - began_s < 25  # a drain may take 30
    assert not [one.pid for one in processes if one.alive()]


def test_a_killed_up_takes_its_cluster_along(foreground: Foreground) -> None:
    processes = foreground.processes()
    end(foreground.popen)
    end_s = time.monotonic() + END_S
    while any(one.alive() for one in processes) and time.monotonic() < end_s:
        time.sleep(0.05)
    assert not [one.pid for one in processes if one.alive()]
    again = run("status", state_dir=foreground.state_dir)
    assert again.returncode == 3
    assert "pdserve up" in again.stderr
