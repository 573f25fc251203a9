"""Owns how far a worker's drain has come: until when its work may go on, and how long controllers get for its last words. Pure.

none -> ordered -> (nothing runs, or its deadline) last words -> (all acknowledged, or LAST_WORDS_S) over
"""

from __future__ import annotations

from collections.abc import Callable

LAST_WORDS_S = 2.0  # for controllers to take what a drained worker still has to say


class Drain:
    def __init__(self) -> None:
        self._deadline: float | None = None  # None = not ordered
        self._last_words_deadline: float | None = None
        self._drained: list[Callable[[], None]] = []

    def order(self, deadline: float, drained: Callable[[], None] | None) -> bool:
        """True the first time. Of several deadlines the earliest holds. drained: called once nothing runs any more."""
        first = self._deadline is None
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
        if drained is not None:
            self._drained.append(drained)
        return first

    def due(self, now: float, live: int) -> bool:
        """Whether what still runs (`live` dispatches) must end now."""
        return self._deadline is not None and (not live or now >= self._deadline)

    def begin_last_words(self, now: float) -> bool:
        """True the first time: those who wait for it have been told."""
        if self._last_words_deadline is not None:
            return False
        self._last_words_deadline = now + LAST_WORDS_S
        for drained in self._drained:
            drained()
        return True

    def over(self, now: float, *, acknowledged: bool) -> bool:
        """acknowledged: whether controllers have heard everything."""
        assert self._last_words_deadline is not None
        return acknowledged or now >= self._last_words_deadline
