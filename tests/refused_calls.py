"""Owns system calls that the kernel refuses: a seccomp filter answers them with EIO instead of doing them, as a broken disk would.

It binds one thread, or all of a process, and cannot be taken back: it ends with them. Needs no privilege.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

Access = Literal["read", "write", "sync"]
Found = TypeVar("Found")

_CALLS: dict[str, tuple[int, int, dict[Access, tuple[int, ...]]]] = {
    # AUDIT_ARCH_…, seccomp itself; pread64, preadv, preadv2; pwrite64, pwritev, pwritev2; fsync, fdatasync
    "x86_64": (0xC000003E, 317, {"read": (17, 295, 327), "write": (18, 296, 328), "sync": (74, 75)}),
    "aarch64": (0xC00000B7, 277, {"read": (67, 69, 286), "write": (68, 70, 287), "sync": (82, 83)}),
}
_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER, _ALL_THREADS = 1, 1
_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF: word at an offset, skip so many if (not) equal, the answer
_CALL_AT, _ARCH_AT = 0, 4  # in seccomp_data
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def refuse(access: Access, threads: Literal["this", "all"]) -> None:
    """From now on the kernel answers EIO. Raises OSError where it takes no filter."""
    arch, seccomp, calls = _CALLS[platform.machine()]
    numbers = calls[access]
    steps = [(_LOAD, 0, 0, _ARCH_AT), (_IF_EQUAL, 0, len(numbers) + 1, arch), (_LOAD, 0, 0, _CALL_AT)]
    steps += [(_IF_EQUAL, len(numbers) - at, 0, number) for at, number in enumerate(numbers)]
    steps += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.EIO)]
    program = _Program(len(steps), b"".join(struct.pack("<HBBI", *step) for step in steps))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    flags = _ALL_THREADS if threads == "all" else 0
    if libc.syscall(seccomp, _SET_MODE_FILTER, flags, ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), "seccomp")


def while_refused(access: Access, work: Callable[[], Found], deadline_s: float = 60.0) -> Found:
    """What `work` returns or raises, done by a thread of its own, the only one whose calls are refused."""
    found: list[Found | Exception] = []

    def run() -> None:
        try:
            refuse(access, "this")
            found.append(work())
        except Exception as error:  # told to whoever waits below
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(deadline_s)
    assert found, "it hangs"
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def filtered(pid: int) -> bool:
    """Whether the first thread of a process has such a filter."""
    return "Seccomp:\t2\n" in Path(f"/proc/{pid}/status").read_text()
