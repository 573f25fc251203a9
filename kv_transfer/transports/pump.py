"""Owns the progress of one event loop: what moves is turned at every turn of the loop, what rests every few milliseconds.

What waits for its peer, and has nothing to do until then, sleeps: the loop goes on when its descriptor is readable.
"""

from __future__ import annotations

import asyncio
import os
from typing import Protocol

IDLE_S = 0.01  # between turns while nothing is transferred
ASLEEP_S = 0.002  # between turns at most while something is transferred: for what no descriptor tells
_SPINS = 64  # progress calls per turn of the loop at most; the first that finds nothing is the last
_STILL_TURNS = 2  # turns in which nothing moved, before the loop sleeps or the core is yielded
_ALL_EVERY = 16


class Turned(Protocol):
    @property
    def busy(self) -> bool: ...

    def turn(self, spins: int, *, everyone: bool) -> bool:
        """Up to `spins` progress calls; `everyone`: look at all that wait, not only at those whose turn it most likely is.

        True where something moved, or where the core is to be kept all the same.
        """

    def arm(self) -> int | None:
        """A descriptor that becomes readable when the peer moves; None where something is to be done yet, or nothing tells."""


class Pump:
    """Drives what was added to it until it is removed."""

    def __init__(self) -> None:
        self._lanes: dict[Turned, None] = {}
        self._next: asyncio.Handle | None = None
        self._spinning = False
        self._turns = 0
        self._still = 0  # turns in which nothing moved, since one did or the core was yielded
        self._armed: list[int] = []  # descriptors that the loop watches while it sleeps

    def add(self, lane: Turned) -> None:
        self._lanes[lane] = None
        self.wake()

    def remove(self, lane: Turned) -> None:
        """Its descriptor is not watched any more."""
        self._lanes.pop(lane, None)
        if self._armed:
            self.wake()

    def wake(self) -> None:
        if not self._spinning:
            self.stop()
            self._spinning = True
            self._next = asyncio.get_running_loop().call_soon(self._turn)

    def stop(self) -> None:
        if self._next is not None:
            self._next.cancel()
        self._next, self._spinning = None, False
        self._disarm()

    def _turn(self) -> None:
        self._disarm()
        self._turns += 1
        busy = [lane for lane in self._lanes if lane.busy]
        last_look = self._still + 1 >= _STILL_TURNS  # before a sleep nobody is left out
        everyone = not busy or last_look or self._turns % _ALL_EVERY == 0
        moved = False
        for lane in list(self._lanes) if everyone else busy:
            moved |= lane.turn(_SPINS if lane.busy else 1, everyone=everyone)
        self._still = 0 if moved else self._still + 1
        self._spinning = bool(busy)
        loop = asyncio.get_running_loop()
        if not busy:
            self._next = loop.call_later(IDLE_S, self._turn) if self._lanes else None
        elif self._still >= _STILL_TURNS:
            self._still = 0
            self._next = self._sleep(busy)
        else:
            self._next = loop.call_soon(self._turn)

    def _sleep(self, busy: list[Turned]) -> asyncio.Handle:
        """The peer has to move first, and where cores are short it may be waiting for ours."""
        loop = asyncio.get_running_loop()
        descriptors = [lane.arm() for lane in busy]
        armed = [descriptor for descriptor in descriptors if descriptor is not None]
        if len(armed) < len(busy):
            os.sched_yield()
            return loop.call_soon(self._turn)
        self._spinning = False
        self._armed = armed
        for descriptor in armed:
            loop.add_reader(descriptor, self.wake)
        return loop.call_later(ASLEEP_S, self._turn)

    def _disarm(self) -> None:
        for descriptor in self._armed:
            asyncio.get_running_loop().remove_reader(descriptor)
        self._armed = []
