"""Owns the question whether another process's memory can be read in one step: process_vm_readv, UCX's transport `cma`.

Without it (and without RDMA) NIXL's UCX copies reads through shared memory or TCP, and there one process aborts when the other
one goes inside a read: "unexpected error: Shared memory error", "stubs.c: Assertion `0' failed", in every one of 11 runs of 60
to 100 closed reads. So such a peer is refused.
"""

from __future__ import annotations

import ctypes


class _IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def address_of(memory: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def can_read(pid: int, address: int, expected: bytes) -> bool:
    """True where process `pid`, as seen from here, holds `expected` at `address` and lets us read it."""
    found = ctypes.create_string_buffer(len(expected))
    here = _IoVector(ctypes.addressof(found), len(expected))
    there = _IoVector(address, len(expected))
    libc = ctypes.CDLL(None, use_errno=True)
    count = libc.process_vm_readv(
        ctypes.c_int(pid),
        ctypes.byref(here),
        ctypes.c_ulong(1),
        ctypes.byref(there),
        ctypes.c_ulong(1),
        ctypes.c_ulong(0),
    )
    return bool(count == len(expected) and found.raw == expected)
