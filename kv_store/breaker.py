"""Owns whether calls go to a medium that failed: none during a pause that grows, then one as a probe. Pure.

closed --failed--> open --pause over--> half-open (one probe) --worked--> closed
                    ^                          |
                    +---------failed-----------+   (the next pause is longer)
"""

from __future__ import annotations

from kv_store.backoff import Backoff


class Breaker:
    """Not thread-safe. lost_s: a probe that has no verdict after so long counts for nothing, and another is let through."""

    def __init__(self, backoff: Backoff, lost_s: float = 10.0) -> None:
        self._backoff = backoff
        self._lost_s = lost_s
        self._probe_s: float | None = None  # when the probe that is under way began

    def admits(self, now_s: float) -> bool:
        """Whether the caller may call now; it then tells `worked` or `failed`."""
        if not self._backoff.pause_s:
            return True
        if self._backoff.off(now_s):
            return False
        if self._probe_s is not None and 0.0 <= now_s - self._probe_s < self._lost_s:
            return False
        self._probe_s = now_s
        return True

    def worked(self) -> None:
        self._backoff.worked()
        self._probe_s = None

    def failed(self, now_s: float) -> None:
        """Calls that were under way together count as one failure."""
        if not self._backoff.off(now_s):
            self._backoff.failed(now_s)
        self._probe_s = None
