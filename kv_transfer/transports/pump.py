"""Owns the progress of one event loop: what moves is turned at every turn of the loop, what rests every few milliseconds."""

from __future__ import annotations

import asyncio
import os
from typing import Protocol

IDLE_S = 0.01  # between turns while nothing is transferred
_SPINS = 64  # progress calls per turn of the loop at most; the first that finds nothing is the last
_YIELD_EVERY = 4  # turns in which nothing moved
_ALL_EVERY = 16


class Turned(Protocol):
    @property
    def busy(self) -> bool: ...

    def turn(self, spins: int, *, everyone: bool) -> bool:
        """Up to `spins` progress calls; `everyone`: look at all that wait, not only at those whose turn it most likely is.

        True where something moved, or where the core is to be kept all the same.
        """


class Pump:
    """Drives what was added to it until it is removed."""

    def __init__(self) -> None:
        self._lanes: dict[Turned, None] = {}
        self._next: asyncio.Handle | None = None
        self._spinning = False
        self._turns = 0
        self._still = 0  # turns in which nothing moved, since one did or the core was yielded

    def add(self, lane: Turned) -> None:
        self._lanes[lane] = None
        self.wake()

    def remove(self, lane: Turned) -> None:
        self._lanes.pop(lane, None)

    def wake(self) -> None:
        if not self._spinning:
            self.stop()
            self._spinning = True
            self._next = asyncio.get_running_loop().call_soon(self._turn)

    def stop(self) -> None:
        if self._next is not None:
            self._next.cancel()
        self._next, self._spinning = None, False

    def _turn(self) -> None:
        self._turns += 1
        busy = [lane for lane in self._lanes if lane.busy]
        everyone = not busy or self._turns % _ALL_EVERY == 0
        moved = False
        for lane in list(self._lanes) if everyone else busy:
            moved |= lane.turn(_SPINS if lane.busy else 1, everyone=everyone)
        self._spinning = bool(busy)
        self._still = 0 if moved else self._still + 1
        if busy and self._still == _YIELD_EVERY:
            # The peer has to move first, and where cores are short it may be waiting for ours.
            self._still = 0
            os.sched_yield()
        loop = asyncio.get_running_loop()
        if busy:
            self._next = loop.call_soon(self._turn)
        else:
            self._next = loop.call_later(IDLE_S, self._turn) if self._lanes else None
