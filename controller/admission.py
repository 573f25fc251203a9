"""Owns the queue in front of the workers: its bound, its order, and how long anything may wait. Pure.

Work that was served before and lost its worker goes first, then lower `priority` values, then earlier arrivals. Only new
requests count against the bound: what was accepted is not refused later.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from controller.placement.place import Shortage
from controller.request import Route
from pdserve.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NoDecodeWorkers,
    NoPrefillWorkers,
    Overloaded,
    PdserveError,
)

Item = TypeVar("Item")

RETRY_AFTER_FULL_S = 1.0
RETRY_AFTER_NO_WORKER_S = 2.0


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    queue_limit: int
    queue_timeout_s: float
    no_worker_grace_s: float


@dataclass(slots=True, eq=False)
class Waiting(Generic[Item]):
    """One dispatch that has no worker yet."""

    item: Item
    priority: int
    retry: bool
    enqueued_s: float
    route: Route | None = None
    short: Shortage | None = None  # what its last placement lacked
    short_since_s: float = 0.0
    refused_now: set[str] = field(default_factory=set)
    apart: bool = False  # it waits for what others do not: see controller.suspicion
    order: tuple[int, int, int] = (0, 0, 0)


class WaitingQueue(Generic[Item]):
    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self._entries: list[Waiting[Item]] = []
        self._next = 0
        self._new = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def over_limit(self) -> bool:
        return self._new > self._limits.queue_limit

    def full(self) -> Overloaded:
        return Overloaded(
            f"{self._limits.queue_limit} requests wait for a worker already. Retry later, or add workers.",
            retry_after_s=RETRY_AFTER_FULL_S,
        )

    def enter(self, entry: Waiting[Item]) -> None:
        """Takes its place; one that came back keeps the one it had."""
        if entry.order == (0, 0, 0):
            self._next += 1
            entry.order = (0 if entry.retry else 1, entry.priority, self._next)
        bisect.insort(self._entries, entry, key=lambda each: each.order)
        self._new += not entry.retry

    def holds(self, entry: Waiting[Item]) -> bool:
        return entry in self._entries

    def leave(self, entry: Waiting[Item]) -> bool:
        """False if it was not there."""
        if entry not in self._entries:
            return False
        self._entries.remove(entry)
        self._new -= not entry.retry
        return True

    def candidates(self) -> Iterator[Waiting[Item]]:
        """Those whose turn it may be. The caller takes them out as they are placed, and says through `short` which were not:
        behind the first that stays, only those with a route of their own are looked at. Nobody waits behind one that is kept apart."""
        blocked = False
        for entry in self._entries[:]:
            if blocked and entry.route is None:
                continue
            yield entry
            blocked = blocked or (entry.route is None and entry.short is not None and not entry.apart)

    def entries(self) -> list[Waiting[Item]]:
        return self._entries[:]

    def expired(self, now: float, absent_since_s: float | None) -> list[tuple[Waiting[Item], PdserveError]]:
        """Takes out those that waited too long. `absent_since_s`: since when no worker at all takes work."""
        gone = [
            (entry, error)
            for entry in self._entries
            if (error := self._verdict(entry, now, absent_since_s)) is not None
        ]
        for entry, _ in gone:
            self.leave(entry)
        return gone

    def _verdict(self, entry: Waiting[Item], now: float, absent_since_s: float | None) -> PdserveError | None:
        waits_since_s, grace_s = entry.enqueued_s, self._limits.no_worker_grace_s
        if absent_since_s is not None and now - max(absent_since_s, waits_since_s) >= grace_s:
            return no_workers("no_decode")
        lacks_role = entry.short in ("no_decode", "no_prefill")
        if lacks_role and now - max(entry.short_since_s, waits_since_s) >= grace_s:
            return no_workers(entry.short)
        if now - waits_since_s >= self._limits.queue_timeout_s:
            return DeadlineExceeded(
                f"No worker had room within {self._limits.queue_timeout_s:g} s. Retry later, or add workers.",
                retry_after_s=RETRY_AFTER_FULL_S,
            )
        return None


def note_shortage(entry: Waiting[Item], short: Shortage, now: float) -> None:
    if entry.short != short:
        entry.short, entry.short_since_s = short, now


def no_workers(short: Shortage | None) -> PdserveError:
    if short == "no_prefill":
        return NoPrefillWorkers(
            "No worker can compute this prompt now. Retry shortly; `pdserve status` shows the workers.",
            retry_after_s=RETRY_AFTER_NO_WORKER_S,
        )
    return NoDecodeWorkers(
        "No worker can decode now. Retry shortly; `pdserve status` shows the workers.",
        retry_after_s=RETRY_AFTER_NO_WORKER_S,
    )


def check_route(route: Route | None, known: frozenset[str]) -> None:
    """Raises InvalidRequest for a forced route to workers that are not there."""
    if route is None:
        return
    for name in (route.prefill_worker, route.decode_worker):
        if name and name not in known:
            listed = ", ".join(sorted(known)[:20]) or "none"
            raise InvalidRequest(f"The route names worker {name!r}; known: {listed}.", param="route")
    if not route.decode_worker:
        raise InvalidRequest("A route needs its decode_worker.", param="route")
