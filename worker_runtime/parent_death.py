"""Owns the tie to the parent process: the kernel kills this process when the parent dies (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal

from pdserve.errors import WorkerLost

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Call first in a child's main thread. parent_pid: as the parent told it. Raises WorkerLost where it is dead already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        raise WorkerLost(f"The parent process {parent_pid} ended before this one could tie itself to it.")
