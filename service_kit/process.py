"""Owns one child process: tied to this one's life, output in a log file, signalled through a pidfd (Linux)."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdserve.local_process import LocalProcess, local_process

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded before any fork


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One line of the process table."""

    name: str
    command: tuple[str, ...]


def die_with_parent(parent_pid: int) -> None:
    """The kernel kills this process when its parent's thread ends. Call first thing in a child.

    parent_pid: as the parent knows itself; where it has ended already, this process ends too.
    """
    if _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def keep_to_cores(cores: Collection[int]) -> None:
    """Every thread of this process, and those that they start, run on these cores from now on; children that run already do not.
    None: wherever they could."""
    for thread in Path("/proc/self/task").iterdir() if cores else ():
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(int(thread.name), cores)


class Child:
    """A running child. Made in the main thread only: PR_SET_PDEATHSIG follows the thread that forks."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen
        self._pidfd = os.pidfd_open(popen.pid)
        self.identity: LocalProcess = local_process(popen.pid)
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(self._pidfd, self._exited)

    @classmethod
    def start(cls, spec: ProcessSpec, log: Path) -> Child:
        """Output is appended to `log`. A session of its own: a terminal's Ctrl-C reaches the supervisor alone.

        Raises OSError where the program cannot be executed.
        """
        parent = os.getpid()
        with log.open("ab") as output:
            popen = subprocess.Popen(
                spec.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(parent),  # safe: this process has one thread
            )
        return cls(popen)

    async def wait(self) -> int:
        """Exit status; -N for signal N."""
        return await asyncio.shield(self._exit)

    def send(self, number: signal.Signals) -> None:
        if not self._exit.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _exited(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._exit.set_result(self._popen.wait())


async def stop_all(children: Sequence[Child], grace_s: float, kill_s: float = 5.0) -> None:
    """SIGTERM, then SIGKILL for those that need longer than `grace_s`. Returns when all have ended.

    Raises TimeoutError where even SIGKILL does not end one within `kill_s` (a process stuck in the kernel).
    """
    if not children:
        return
    for child in children:
        child.send(signal.SIGTERM)
    waits = [asyncio.ensure_future(child.wait()) for child in children]
    _, late = await asyncio.wait(waits, timeout=grace_s)
    if late:
        for child in children:
            child.send(signal.SIGKILL)
        _, stuck = await asyncio.wait(waits, timeout=kill_s)
        if stuck:
            raise TimeoutError(f"{len(stuck)} processes survived SIGKILL for {kill_s} s")
