"""The loop of the engine process over a scripted engine: waiting, loads, faults."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest

from engine.protocol import (
    Cancel,
    Command,
    Dispatch,
    DispatchFault,
    Event,
    Load,
    ReserveBlocks,
    Sampling,
    SetPolicy,
    Stop,
    Work,
    WorkFailed,
)
from worker_runtime.engine_loop import IDLE_WAIT_S, run

DISPATCH = Dispatch(1, 1)
LOAD = Load(0, 1, 1, 0, 0, 0, 0, 0, 0.0, 0, 0, 0, 0)
SAMPLING = Sampling(0.0, 1.0, 0, 0.0, 1.0, 0.0, 0.0, {}, 7, 8, 0, False, ())
WORK = Work(DISPATCH, "r1", (0,), bytes(4), 1, SAMPLING, b"")


class Channel:
    """Gives one list of commands per wait; the last one is Stop."""

    def __init__(self, *batches: list[Command]) -> None:
        self.batches: deque[list[Command]] = deque([*batches, [Stop()]])
        self.waits: list[float] = []
        self.emitted: list[Event] = []
        self.flushed: list[Event] = []

    def receive(self, wait_s: float) -> list[Command]:
        self.waits.append(wait_s)
        return self.batches.popleft()

    def emit(self, event: Event) -> None:
        self.emitted.append(event)

    def flush(self) -> None:
        self.flushed += self.emitted
        self.emitted.clear()


class ScriptedEngine:
    def __init__(self, *steps: Callable[[], bool]) -> None:
        self.steps = deque(steps)
        self.handled: list[Command] = []

    def handle(self, command: Command) -> None:
        self.handled.append(command)

    def step(self) -> bool:
        return self.steps.popleft()() if self.steps else False

    def load(self) -> Load:
        return LOAD


def idle() -> bool:
    return False


def busy() -> bool:
    return True


def still() -> float:
    return 0.0


def test_the_loop_waits_while_idle_and_never_while_there_is_work() -> None:
    channel = Channel([], [], [])
    run(ScriptedEngine(busy, busy, idle), channel, still)
    assert channel.waits == [IDLE_WAIT_S, 0.0, 0.0, IDLE_WAIT_S]


def test_commands_are_handled_before_the_step_in_their_order() -> None:
    first, second = SetPolicy(1, 1, 1, 1), SetPolicy(2, 2, 2, 2)
    engine = ScriptedEngine(idle)
    run(engine, Channel([first, second]), still)
    assert engine.handled == [first, second]


def test_a_load_is_told_every_quarter_of_a_second_and_with_every_reservation() -> None:
    times = iter([0.0, 0.0, 0.1, 0.2, 0.26, 0.3])
    channel = Channel([], [], [ReserveBlocks(WORK, 1000)], [], [])
    run(ScriptedEngine(), channel, lambda: next(times))
    assert channel.flushed == [LOAD] * 3


def test_a_fault_of_one_dispatch_is_answered_and_the_loop_goes_on() -> None:
    def fault() -> bool:
        raise DispatchFault(DISPATCH, "internal_error", "the sampler failed")

    channel, engine = Channel([], []), ScriptedEngine(fault, idle)
    run(engine, channel, still)
    assert engine.handled == [Cancel(DISPATCH)]
    assert WorkFailed(DISPATCH, (), "internal_error", "the sampler failed") in channel.flushed


def test_any_other_error_of_a_step_ends_the_loop() -> None:
    def broken() -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(ScriptedEngine(broken), Channel([]), still)
