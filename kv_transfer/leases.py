"""Owns the names of leases: dispatches, and the error text that both lease machines of a hand-off share. Pure.

The machines: `source_lease` (prefill worker's blocks), `writer_lease` (who may still write into destination blocks). Each is
`step(state, event, now_s) -> (state, commands)`; the shell runs the commands. The third lease, of a worker's controller, is that
of its session (`worker_runtime.session`).
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.errors import LeaseExpired


@dataclass(frozen=True, slots=True, order=True)
class DispatchKey:
    """One dispatch of a request. Issued by the controller; a re-dispatch raises `attempt`."""

    request_key: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.request_key:016x}/{self.attempt}"


def expired(what: str, ttl_s: float) -> LeaseExpired:
    return LeaseExpired(f"The {what} lease was not renewed for {ttl_s:g} s.")
