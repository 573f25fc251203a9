"""Owns the judgement whether a peer is silent, counted in our own beats. Pure."""

from __future__ import annotations

# Beats per configured heartbeat: the peer is heard twice as often as it must be, and silence is seen half a beat earlier.
BEATS_PER_HEARTBEAT = 2


class Liveness:
    """Counts our beats without a message, not seconds: a process that was stopped itself does not accuse its peer."""

    def __init__(self, misses: int) -> None:
        self._limit = misses * BEATS_PER_HEARTBEAT
        self._missed = 0

    def heard(self) -> None:
        self._missed = 0

    def beat(self) -> bool:
        """One beat passed. False: the peer counts as dead."""
        self._missed += 1
        return self._missed <= self._limit
