"""Owns the lanes of the tests: work that a device would do beside the decodes, done early or late, and told late."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from engine.cuda_export import Event

When = Literal["launch", "end"]


@dataclass(slots=True)
class Launched:
    """An event that is not passed at the next `polls` looks, unless it is waited for."""

    lane: PollLane
    work: Callable[[], None] | None
    polls: int

    def query(self) -> bool:
        self.polls -= 1
        if self.polls < 0:
            self._end()
        return self.work is None

    def synchronize(self) -> None:
        self.lane.waits += self.work is not None
        self._end()

    def _end(self) -> None:
        work, self.work = self.work, None
        if work is not None and self.lane.when == "end":
            work()


@dataclass(slots=True)
class PollLane:
    """An engine.flight.Lane. when: the work is done at once, or not before the event passes: what a device does lies in between."""

    rng: random.Random
    when: When
    most_polls: int
    launches: int = 0
    waits: int = 0  # landings that were waited for
    landed: int = 0
    log: list[str] = field(default_factory=list)

    def launch(self, work: Callable[[], None]) -> Event:
        self.launches += 1
        if self.when == "launch":
            work()
        return Launched(self, work, self.rng.randint(0, self.most_polls))

    def land(self, work: Callable[[], None]) -> None:
        self.landed += 1
        work()

    def close(self) -> None:
        self.log.append("closed")


class Never(random.Random):
    """The rng of a PollLane whose flights end only where they are waited for."""

    def randint(self, a: int, b: int) -> int:
        return 1 << 30
