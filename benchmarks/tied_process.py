"""Owns the tie of a child to the life of a benchmark: the kernel kills it with the thread that started it, however that one ends.

`python -m benchmarks.tied_process PID COMMAND…` becomes COMMAND, under the same pid.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from service_kit.process import die_with_parent


def tied(command: Sequence[str]) -> list[str]:
    """`command`, for a process that this one starts; its own children are not tied, unless they tie themselves."""
    return [sys.executable, "-m", "benchmarks.tied_process", str(os.getpid()), *command]


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
