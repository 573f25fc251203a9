"""Owns naming a process of this machine beyond its pid: a pid is reused, a pid with its start time is not (Linux)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class LocalProcess:
    pid: int
    start_ticks: int  # since boot, from /proc/PID/stat; 0 = not known, the pid alone decides

    def alive(self) -> bool:
        """False also for a zombie, and where the pid belongs to another process by now."""
        found = _stat(self.pid)
        return found is not None and found[0] not in "ZX" and self.start_ticks in (0, found[1])

    def send(self, number: signal.Signals) -> None:
        """Does nothing where the process has ended."""
        if not self.alive():
            return
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return


def local_process(pid: int) -> LocalProcess:
    found = _stat(pid)
    return LocalProcess(pid, found[1] if found is not None else 0)


def children_of(parents: Iterable[LocalProcess]) -> list[LocalProcess]:
    """Live processes whose parent is one of `parents`."""
    pids = {parent.pid for parent in parents if parent.alive()}
    found = [local_process(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [one for one in found if one.alive() and _parent(one.pid) in pids]


def wait_gone(processes: Iterable[LocalProcess], deadline_s: float) -> list[LocalProcess]:
    """Waits until all have ended; returns those that have not at the deadline."""
    end = time.monotonic() + deadline_s
    left = [process for process in processes if process.alive()]
    while left and time.monotonic() < end:
        time.sleep(_POLL_S)
        left = [process for process in left if process.alive()]
    return left


def end_all(processes: Iterable[LocalProcess], deadline_s: float) -> list[LocalProcess]:
    """SIGKILL; returns those that live on after the deadline."""
    found = list(processes)
    for process in found:
        process.send(signal.SIGKILL)
    return wait_gone(found, deadline_s)


def _parent(pid: int) -> int | None:
    fields = _fields(pid)
    return int(fields[1]) if fields is not None else None


def _stat(pid: int) -> tuple[str, int] | None:
    """(state letter, start time in ticks)."""
    fields = _fields(pid)
    return (fields[0], int(fields[19])) if fields is not None else None


def _fields(pid: int) -> list[str] | None:
    """Of /proc/PID/stat, from the state letter on (number 3 in proc(5))."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
