"""Owns what every contender of `benchmarks/transfer_peers.py` has in common; standard library only, so that any python runs it.

A contender is a process that starts its own other side. Each line on stdin is a transfer of all bytes; it answers with "seconds
cpu_seconds" (of both processes, for that transfer alone).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable

MESSAGES = 64
MESSAGE_BYTES = 4 * 2**20
TOTAL_BYTES = MESSAGES * MESSAGE_BYTES
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def filled_memory(fill: int) -> tuple[mmap.mmap, int]:
    """TOTAL_BYTES of touched memory, and where they lie."""
    memory = mmap.mmap(-1, TOTAL_BYTES)
    memory[:] = bytes((fill,)) * TOTAL_BYTES
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and all its threads, in steps of 10 ms."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def start_other_side(module: str) -> subprocess.Popen[bytes]:
    """`module` with the argument "passive", in this python."""
    command = [sys.executable, "-m", module, "passive"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def line_of(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().decode().strip()
    if not line:
        raise RuntimeError("the other side ended")
    return line


def tell(process: subprocess.Popen[bytes], word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{word}\n".encode())
    process.stdin.flush()


def answer(transfer: Callable[[], None], other: subprocess.Popen[bytes]) -> None:
    """Serves stdin until its end."""
    print("ready", flush=True)
    for _ in sys.stdin:
        before_s, start_s = cpu_s(os.getpid()) + cpu_s(other.pid), time.perf_counter()
        transfer()
        elapsed_s = time.perf_counter() - start_s
        print(elapsed_s, cpu_s(os.getpid()) + cpu_s(other.pid) - before_s, flush=True)
    assert other.stdin is not None
    other.stdin.close()
    other.wait(20)


def stdin_line(wait_s: float) -> str | None:
    """A line, "" at the end of stdin, None where nothing came in `wait_s`.

    Byte by byte: what a buffer holds, select does not see.
    """
    if not select.select([0], [], [], wait_s)[0]:
        return None
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line.decode()
