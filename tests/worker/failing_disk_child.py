"""Owns a worker process for tests whose disk breaks: after SIGUSR1 the kernel refuses its reads, after SIGUSR2 its writes.

The engine process is a child that began before, and goes on.
"""

from __future__ import annotations

import signal
import sys

from tests.refused_calls import refuse
from worker.__main__ import main

READS_BREAK, WRITES_BREAK = signal.SIGUSR1, signal.SIGUSR2

if __name__ == "__main__":
    signal.signal(READS_BREAK, lambda *_: refuse("read", "all"))
    signal.signal(WRITES_BREAK, lambda *_: refuse("write", "all"))
    sys.exit(main(sys.argv[1:]))
