"""Owns the life of tests' child processes: they end with the process of the test, and what they are waited for has a deadline.

A test process may end without a word (SIGKILL, or its time limit): no `finally` runs then, and a child would stay for ever.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

REAP_S = 30.0  # even a killed process takes a moment on a busy machine
_PR_SET_PDEATHSIG = 1


def tied(command: Sequence[str]) -> list[str]:
    """`command` in a process that the kernel kills with the thread that starts it; its pid is the command's own."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def when_we_end(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """A process that runs `command` once this one has ended, however. Kill it where `command` is not needed any more."""
    script = ["/bin/sh", "-c", 'cat >/dev/null; exec "$@"', "sh", *command]
    # A session of its own: what is sent to our whole group, as at a time limit, does not reach it.
    silent = subprocess.DEVNULL
    return subprocess.Popen(script, stdin=subprocess.PIPE, stdout=silent, stderr=silent, start_new_session=True)


@contextmanager
def killed_after(child: subprocess.Popen[str], deadline_s: float) -> Iterator[None]:
    """What reads its output inside comes to an end: to that of the file, once the child is killed."""
    timer = threading.Timer(deadline_s, child.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end(child: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """By SIGKILL, whatever it does. Raises TimeoutExpired where even that does not end it."""
    child.kill()
    child.wait(REAP_S)
    if child.stdin is not None:
        child.stdin.close()


def _become(parent_pid: int, command: list[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == parent_pid:
        os.execvp(command[0], command)


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
