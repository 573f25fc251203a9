"""Owns the binding of compute threads in a benchmark's own process: one to each of the first allowed cores.

Unbound, two can end on one core, where each barrier waits for a time slice.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence


def add_cores(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cores", type=_core_list, help=argparse.SUPPRESS)  # what the bound program is begun with


def require_bound(
    parser: argparse.ArgumentParser, given: argparse.Namespace, module: str, arguments: Sequence[str]
) -> None:
    """Begins `module` anew, bound, unless it is: OpenMP reads its environment when torch is imported. `given` has threads, cores."""
    if given.cores is not None:
        return
    allowed = sorted(os.sched_getaffinity(0))
    if not 0 < given.threads <= len(allowed):
        parser.error(f"--threads must lie in 1 .. {len(allowed)}, the cores that this process may use")
    cores = allowed[: given.threads]
    environment = {**os.environ, "GOMP_CPU_AFFINITY": " ".join(map(str, cores)), "OMP_NUM_THREADS": str(len(cores))}
    command = [sys.executable, "-m", module, *arguments, "--cores", ",".join(map(str, cores))]
    os.execve(sys.executable, command, environment)


def _core_list(text: str) -> list[int]:
    return [int(core) for core in text.split(",")]
