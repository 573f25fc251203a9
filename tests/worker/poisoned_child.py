"""Owns an engine process for tests: the native engine, which dies by SIGKILL while it computes a prompt that begins with POISON."""

from __future__ import annotations

import os
import signal
import sys
from array import array

from engine.native import NativeEngine
from engine.protocol import Command, Dispatch, EngineReady, Event, EventSink, Load, Started, Submit
from service_kit.config import ClusterConfig
from worker.engine_main import open_native
from worker_runtime.engine_process import host_engine

POISON = (66, 77, 88, 99)
_POISON_BYTES = array("i", POISON).tobytes()


class MortalSink:
    """Passes on what the engine says, until it says more of its step than that a poisonous prompt was begun."""

    def __init__(self, sink: EventSink) -> None:
        self._sink = sink
        self._dying = False
        self.poisonous: set[Dispatch] = set()

    def emit(self, event: Event) -> None:
        if isinstance(event, Started):
            self._dying = self._dying or event.dispatch in self.poisonous
        elif self._dying:
            os.kill(os.getpid(), signal.SIGKILL)
        self._sink.emit(event)

    def flush(self) -> None:
        self._sink.flush()


class MortalEngine:
    """Implements worker_runtime.engine_process.HostedEngine."""

    def __init__(self, engine: NativeEngine, sink: MortalSink) -> None:
        self._engine = engine
        self._sink = sink

    @property
    def arena_fd(self) -> int:
        return self._engine.arena_fd

    def ready(self) -> EngineReady:
        return self._engine.ready()

    def handle(self, command: Command) -> None:
        if isinstance(command, Submit) and command.work.token_ids.startswith(_POISON_BYTES):
            self._sink.poisonous.add(command.work.dispatch)
        self._engine.handle(command)

    def step(self) -> bool:
        return self._engine.step()

    def load(self) -> Load:
        return self._engine.load()


def open_mortal(config: ClusterConfig, sink: EventSink) -> MortalEngine:
    mortal = MortalSink(sink)
    return MortalEngine(open_native(config, mortal), mortal)


if __name__ == "__main__":
    sys.exit(host_engine(int(sys.argv[1]), int(sys.argv[2]), open_mortal))
