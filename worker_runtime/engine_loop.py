"""Owns the loop of the engine process: commands in, one step, events out, for any Engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from engine.protocol import Cancel, Command, DispatchFault, Engine, Event, ReserveBlocks, Stop, WorkFailed

IDLE_WAIT_S = 0.25
LOAD_INTERVAL_S = 0.25


class CommandChannel(Protocol):
    """Where the loop takes commands from and puts events; `worker_runtime.engine_channel.EngineChannel`."""

    def receive(self, wait_s: float) -> list[Command]: ...

    def emit(self, event: Event) -> None: ...

    def flush(self) -> None: ...


def run(engine: Engine, channel: CommandChannel, clock: Callable[[], float]) -> None:
    """Runs until Stop; whatever `channel` or `engine` raises ends the loop, and with it the process.

    While there is work, commands are read without waiting; an idle loop waits in the socket, so that it costs nothing.
    A DispatchFault of a step ends that dispatch alone.
    """
    busy = False
    load_due = clock()
    while True:
        for command in channel.receive(0.0 if busy else IDLE_WAIT_S):
            if isinstance(command, Stop):
                channel.flush()
                return
            engine.handle(command)
            if isinstance(command, ReserveBlocks):
                channel.emit(engine.load())  # placement decides by the load that comes with the answer
        busy = _step(engine, channel)
        now = clock()
        if now >= load_due:
            channel.emit(engine.load())
            load_due = now + LOAD_INTERVAL_S
        channel.flush()


def _step(engine: Engine, channel: CommandChannel) -> bool:
    try:
        return engine.step()
    except DispatchFault as fault:
        channel.emit(WorkFailed(fault.dispatch, (), fault.reason, str(fault)))
        engine.handle(Cancel(fault.dispatch))
        return True
