"""Owns when a medium that failed is tried again: after a pause that grows with each failure in a row. Pure."""

from __future__ import annotations


class Backoff:
    """One success ends it. Times are of any clock; one that jumps back ends the pause, so that none lasts for ever."""

    def __init__(self, first_s: float = 1.0, most_s: float = 60.0) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._failures = 0
        self._failed_s = 0.0

    def off(self, now_s: float) -> bool:
        """Whether the medium is left alone now."""
        return self._failures > 0 and 0.0 <= now_s - self._failed_s < self.pause_s

    @property
    def pause_s(self) -> float:
        """After the last failure; 0 without one."""
        return min(self._most_s, self._first_s * 2.0 ** min(self._failures - 1, 30)) if self._failures else 0.0

    def failed(self, now_s: float) -> None:
        self._failures += 1
        self._failed_s = now_s

    def worked(self) -> None:
        self._failures = 0
