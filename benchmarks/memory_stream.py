"""Owns a process that only copies memory, until it is ended: what a busy neighbour costs all who share caches and memory with it.

`python -m benchmarks.memory_stream`, one thread. Says "ready" on stdout once its memory is touched.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from service_kit.process import die_with_parent

BLOCK_BYTES = 128 * 2**20  # far more than any cache holds


@contextmanager
def memory_stream() -> Iterator[None]:
    """Such a process runs inside."""
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.memory_stream"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != b"ready":
            raise RuntimeError("The process that streams memory did not start.")
        yield
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    die_with_parent(os.getppid())
    source, target = np.zeros(BLOCK_BYTES, np.uint8), np.zeros(BLOCK_BYTES, np.uint8)
    source.fill(1)
    target.fill(1)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        np.copyto(target, source)


if __name__ == "__main__":
    main()
