"""Owns the processes of a fleet that is spread over several: each is this command again, with `--part`."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

END_S = 10.0
POLL_S = 0.2


class _Stopped(Exception):
    """SIGTERM or SIGINT."""


def run_parts(arguments: Sequence[str], parts: int) -> int:
    """Runs until a signal comes or one part ends, then ends all. Parts read the end of their stdin, which also comes when
    this process is killed. Returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    children: list[subprocess.Popen[bytes]] = []
    try:
        for part in range(parts):
            command = [sys.executable, "-m", "simulator.fleet", *arguments, "--part", str(part)]
            children.append(subprocess.Popen(command, stdin=subprocess.PIPE))
        while all(child.poll() is None for child in children):
            time.sleep(POLL_S)
        return 1
    except _Stopped:
        return 0
    finally:
        _end(children)


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        assert child.stdin is not None
        child.stdin.close()
    due_s = time.monotonic() + END_S
    for child in children:
        try:
            child.wait(max(due_s - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
