"""Owns prompts computed beside the decodes: the lane they are launched on, the one batch of them in the air, what it holds up.

    take_off --> in the air: the schedule neither plans, preempts nor frees its sequences --> landing: as after any batch

A device's lane returns before the work is done, so decodes are stepped meanwhile. What would free blocks of the flight, or copy
out of the pool behind it, waits for the landing; prefixes that it computes are found by others only then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from engine.cuda_export import Event
from engine.page_protocol import LoadPages, PagesLoaded
from engine.protocol import Cancel, Command, Dispatch
from engine.schedule import Part, Schedule
from engine.step_batch import StepBatch


class Lane(Protocol):
    """Where prompts are computed. Implementations: engine.cuda_streams.CudaPromptLane; tests/engine/lanes.py has others."""

    def launch(self, work: Callable[[], None]) -> Event:
        """Begins `work` behind all that the decodes' side was given so far, and waits for none of it. Launched once a time: the
        event of the last launch has passed."""

    def land(self, work: Callable[[], None]) -> None:
        """Runs `work`, which reads what the launched work made. What the decodes' side is given afterwards comes behind both."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Computed:
    """hidden: the last state of the rows of `batch`, [n, hidden]."""

    batch: StepBatch
    hidden: torch.Tensor


@dataclass(slots=True, eq=False)
class Flight:
    parts: tuple[Part, ...]
    launched_s: float
    dispatches: frozenset[Dispatch]
    postponed: list[Command] = field(default_factory=list)
    computed: Computed | None = None  # set by the lane

    @property
    def prompt_tokens(self) -> int:
        return sum(part.count for part in self.parts)

    def holds_up(self, command: Command) -> bool:
        match command:
            case Cancel():
                return command.dispatch in self.dispatches  # it frees blocks that are being written
            case LoadPages():
                return command.mode == "lend"  # its copies to the arena would come behind those of the flight
            case PagesLoaded():
                return any(isinstance(one, LoadPages) and one.load_id == command.load_id for one in self.postponed)
            case _:
                return False


class Flights:
    """At most one at a time; without a lane, none."""

    def __init__(self, lane: Lane | None, schedule: Schedule) -> None:
        self._lane = lane
        self._schedule = schedule
        self._flight: Flight | None = None
        self._event: Event | None = None

    @property
    def in_air(self) -> bool:
        return self._flight is not None

    def boarding(self, parts: Sequence[Part]) -> list[Part]:
        """Those that may take off now; the others decode."""
        if self._lane is None or self._flight is not None:
            return []
        return [part for part in parts if not part.sequence.decodes]

    def take_off(self, parts: Sequence[Part], compute: Callable[[], Computed]) -> None:
        """Launches `compute`, which makes the batch of `parts` and computes it."""
        assert self._lane is not None
        assert self._flight is None
        dispatches = frozenset(part.sequence.state.dispatch for part in parts)
        flight = Flight(tuple(parts), time.perf_counter(), dispatches)

        def work() -> None:
            flight.computed = compute()

        self._schedule.flying = frozenset(part.sequence for part in parts)
        self._flight = flight
        self._event = self._lane.launch(work)

    def ended(self) -> bool:
        """Whether there is a flight that can land without waiting."""
        return self._event is not None and self._event.query()

    def postpones(self, command: Command) -> bool:
        """Whether `command` waits for the landing, and is then part of the flight."""
        if self._flight is None:
            return False
        waits = self._flight.holds_up(command)
        if waits:
            self._flight.postponed.append(command)
        return waits

    def land(self, follow: Callable[[Flight, Computed], None]) -> None:
        """Waits for the flight, then gives it to `follow`; its sequences are the schedule's again."""
        flight, event, lane = self._flight, self._event, self._lane
        assert flight is not None
        assert event is not None
        assert lane is not None
        event.synchronize()
        computed = flight.computed
        assert computed is not None, "the lane's event passed before its work was done"
        self._flight = self._event = None
        self._schedule.flying = frozenset()
        lane.land(lambda: follow(flight, computed))

    def close(self) -> None:
        """Waits for what is in the air; it is dropped."""
        if self._event is not None:
            self._event.synchronize()
        if self._lane is not None:
            self._lane.close()
