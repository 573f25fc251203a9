"""Owns the processes of a benchmark: start, wait, CPU use, and a sure end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

import psutil

from benchmarks.tied_process import tied

T = TypeVar("T")
END_S = 10.0


@dataclass(frozen=True, slots=True)
class Started:
    """A process and its children, by pid. `log` holds stdout and stderr."""

    name: str
    process: psutil.Popen
    log: Path

    def cpu_s(self) -> float:
        """CPU seconds so far, children included."""
        members = [self.process, *self.process.children(recursive=True)]
        return sum(times.user + times.system for member in members if (times := _cpu_times(member)))

    def check(self) -> None:
        """Raises RuntimeError with the end of the log if the process has ended."""
        if self.process.poll() is not None:
            tail = self.log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}:\n{tail}")


def unwind_on_sigterm() -> None:
    """From now on SIGTERM ends this process as an exit does: what it started is ended, what it wrote for itself removed."""
    signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _cpu_times(member: psutil.Process) -> psutil._ntuples.pcputimes | None:
    try:
        return member.cpu_times()
    except psutil.NoSuchProcess:
        return None


@contextmanager
def started(name: str, module: str, arguments: Sequence[str], folder: Path) -> Iterator[Started]:
    """`python -m module arguments…`, ended with its children when the block is left, and killed with this process."""
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = psutil.Popen(
            tied([sys.executable, "-m", module, *arguments]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    running = Started(name, process, log)
    try:
        yield running
    finally:
        end(running)


def end(running: Started) -> None:
    """SIGTERM, twice as an operator would (the first one drains), then SIGKILL for whatever is left."""
    if running.process.poll() is not None:
        return
    members = [running.process, *running.process.children(recursive=True)]
    for grace_s in (0.5, END_S):
        if running.process.poll() is None:
            running.process.terminate()
        _, members = psutil.wait_procs(members, timeout=grace_s)
    for member in members:
        member.kill()
    psutil.wait_procs(members, timeout=END_S)


def wait_for(what: str, ready: Callable[[], T | None], watched: Sequence[Started], deadline_s: float) -> T:
    """Polls `ready` until it gives something. Raises RuntimeError when a watched process ends, or TimeoutError."""
    due_s = time.monotonic() + deadline_s
    while time.monotonic() < due_s:
        for process in watched:
            process.check()
        found = ready()
        if found is not None:
            return found
        time.sleep(0.1)
    raise TimeoutError(f"{what}: not within {deadline_s:g} s")
