"""Owns a stand-in for a controller or worker: `stand_in.py KIND MARKS_FILE`, appends what it does to MARKS_FILE.

KIND: "polite" ends at SIGTERM, "deaf" ignores it, "dying" ends at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType


def mark(path: str, text: str) -> None:
    with open(path, "a") as marks:
        marks.write(f"{text} {os.getpid()}\n")


def main(kind: str, path: str) -> None:
    over = threading.Event()

    def ended(number: int, frame: FrameType | None) -> None:
        mark(path, "asked")
        if kind != "deaf":
            over.set()

    signal.signal(signal.SIGTERM, ended)
    mark(path, "started")
    sys.stderr.write(f"output of {kind}\n")
    if kind == "dying":
        sys.exit(7)
    while not over.wait(3600):
        pass
    mark(path, "ended")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
