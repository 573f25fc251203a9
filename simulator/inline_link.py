"""Owns the link to a modelled engine that runs on the event loop of its worker: step times are awaited, not computed.

As in an engine process, commands wait for the step in progress, and a Load comes every quarter of a second and after a reservation.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from engine.protocol import Command, EngineReady, Event, ReserveBlocks, Stop
from kv_transfer.arena import Arena
from pdserve.errors import WorkerLost
from simulator.modelled_engine import ModelledConfig, ModelledEngine
from worker_runtime.engine_loop import LOAD_INTERVAL_S


class InlineEngineLink:
    """Implements worker_runtime.engine_link.EngineLink. Create it inside a running loop."""

    def __init__(self, config: ModelledConfig) -> None:
        self._loop = asyncio.get_running_loop()
        self._events = _EventQueue()
        self._commands: deque[Command] = deque()
        self._commanded = asyncio.Event()
        self._closed = False
        self._engine = ModelledEngine(config, self._events, clock=self._loop.time)
        self._ready = self._engine.ready()
        self._arena = Arena(self._engine.arena_fd, config.layout)
        self._task = self._loop.create_task(self._run(), name="modelled-engine")
        self._task.add_done_callback(self._ended)

    @property
    def ready(self) -> EngineReady:
        return self._ready

    @property
    def arena(self) -> Arena:
        return self._arena

    def send(self, command: Command) -> None:
        if self._events.failure is not None:
            raise WorkerLost(self._events.failure)
        self._commands.append(command)
        self._commanded.set()

    async def events(self) -> AsyncIterator[Event]:
        while True:
            for event in await self._events.take():
                yield event

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._task.cancel()
        await asyncio.wait([self._task])
        self._arena.close()
        self._engine.close()

    async def _run(self) -> None:
        load_due_s = 0.0
        while True:
            self._handle_commands()
            now_s = self._loop.time()
            if now_s >= load_due_s:
                self._events.emit(self._engine.load())
                load_due_s = now_s + LOAD_INTERVAL_S
            self._events.flush()
            if not await self._step():
                await self._wait_for_command(load_due_s - self._loop.time())

    def _handle_commands(self) -> None:
        self._commanded.clear()
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, Stop):
                raise WorkerLost("the engine was stopped")
            self._engine.handle(command)
            if isinstance(command, ReserveBlocks):
                self._events.emit(self._engine.load())

    async def _step(self) -> bool:
        plan = self._engine.begin_step()
        if plan is None:
            return False
        # Deadlines, not pauses: the time that the events' handling takes is no part of the modelled step.
        due_s = self._loop.time()
        for pause_s in self._engine.phases(plan):
            self._events.flush()
            due_s += pause_s
            await asyncio.sleep(max(due_s - self._loop.time(), 0.0))
        if plan.duration_s == 0:
            await asyncio.sleep(0)
        return True

    async def _wait_for_command(self, wait_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(wait_s, 0.0)):
                await self._commanded.wait()

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        self._events.fail(str(error) if error is not None else "the link was closed")


class _EventQueue:
    """The engine's sink: what one step emitted wakes the consumer once."""

    def __init__(self) -> None:
        self.failure: str | None = None
        self._events: list[Event] = []
        self._arrived = asyncio.Event()

    def emit(self, event: Event) -> None:
        self._events.append(event)

    def flush(self) -> None:
        if self._events:
            self._arrived.set()

    def fail(self, reason: str) -> None:
        self.failure = reason
        self._arrived.set()

    async def take(self) -> list[Event]:
        await self._arrived.wait()
        events, self._events = self._events, []
        if self.failure is None:
            self._arrived.clear()
        elif not events:
            raise WorkerLost(self.failure)
        return events
