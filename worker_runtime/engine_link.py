"""Owns the io process's view of its engine: the EngineLink protocol, and the link to an engine in a child process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol, cast

from engine.protocol import ENCODER, EVENTS, Command, EngineReady, Event, Stop
from kv_transfer.arena import Arena
from pdserve.errors import ConfigInvalid, WorkerLost
from worker_runtime.engine_process import EXIT_CONFIG
from worker_runtime.framing import MAX_FRAME_BYTES, FrameReader, FrameTooLarge, encode_frame

_RECEIVE_BYTES = 1 << 20
_STOP_DEADLINE_S = 2.0
_EVENTS_HELD = 65_536  # beyond it the link stops reading, and the engine waits in its next flush
_COMMAND_BYTES_HELD = 4 * MAX_FRAME_BYTES


class EngineLink(Protocol):
    """One engine, wherever it runs."""

    @property
    def ready(self) -> EngineReady: ...

    @property
    def arena(self) -> Arena: ...

    def send(self, command: Command) -> None:
        """Hands `command` over, without waiting. Raises WorkerLost once the engine is gone."""

    def events(self) -> AsyncIterator[Event]:
        """The engine's events after EngineReady, in order, for one consumer. Raises WorkerLost when the engine is gone."""

    async def close(self) -> None:
        """Stops the engine; idempotent."""


class ProcessEngineLink:
    """The link to `python -m worker.engine_main` as a child: a Unix socket of frames, and the arena's descriptor beside the
    first of them. The end of either process closes the socket, so that the other one knows at once."""

    def __init__(self, process: asyncio.subprocess.Process, stream: _EventStream, ready: EngineReady, arena: Arena):
        self._process = process
        self._stream = stream
        self._ready = ready
        self._arena = arena

    @classmethod
    async def start(
        cls, settings: bytes, deadline_s: float, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> ProcessEngineLink:
        """Starts the engine process and waits until it is ready.

        settings: its start-up frame. command: its argument vector, to which the link's descriptor and the pid of this process
        are appended. environment: what it has beyond ours. Raises WorkerLost when it ends or is not ready within `deadline_s`,
        ConfigInvalid when it refuses to start.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            arguments = [
                *(command or (sys.executable, "-m", "worker.engine_main")),
                str(theirs.fileno()),
                str(os.getpid()),
            ]
            process = await asyncio.create_subprocess_exec(
                *arguments,
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                env={**os.environ, **(environment or {})},
            )
        ours.setblocking(False)
        reader = FrameReader()
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.get_running_loop().sock_sendall(ours, encode_frame(settings))
                ready, arena, following = await _receive_ready(ours, reader)
        except (TimeoutError, OSError, WorkerLost) as error:
            ours.close()
            await _end(process)
            if process.returncode == EXIT_CONFIG:
                raise ConfigInvalid("The engine process refused its configuration; its log says why.") from error
            raise WorkerLost(f"the engine process did not start ({error or 'deadline'}); its log says why") from error
        stream = _EventStream(reader, following, ours.dup())
        await asyncio.get_running_loop().create_unix_connection(lambda: stream, sock=ours)
        return cls(process, stream, ready, arena)

    @property
    def ready(self) -> EngineReady:
        return self._ready

    @property
    def arena(self) -> Arena:
        return self._arena

    def send(self, command: Command) -> None:
        self._stream.write(encode_frame(ENCODER.encode(command)))

    async def events(self) -> AsyncIterator[Event]:
        while True:
            for event in await self._stream.next_events():
                yield event

    async def close(self) -> None:
        if not self._stream.lost:
            self.send(Stop())
        await _end(self._process)
        self._stream.close()
        self._arena.close()


class _EventStream(asyncio.Protocol):
    """Decodes what arrives in one wake-up and wakes the consumer once.

    inbox: a second descriptor of the socket. A command that finds the engine dead ends the transport with what the engine said
    before its death unread; that is read here.
    """

    def __init__(self, reader: FrameReader, following: list[Event], inbox: socket.socket) -> None:
        self._reader = reader
        self._inbox = inbox
        self._events: deque[Event] = deque(following)
        self._arrived = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self._failure = ""

    @property
    def lost(self) -> bool:
        return bool(self._failure)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        if self._events:
            self._arrived.set()

    def data_received(self, data: bytes) -> None:
        self._take(data)
        if len(self._events) > _EVENTS_HELD and self._transport is not None and not self._failure:
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        with self._inbox, contextlib.suppress(OSError):  # nothing more is there, or the end was a reset
            while not self._failure and (data := self._inbox.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)):
                self._take(data)
        self._lose(f"the engine process is gone ({exc or 'end of its stream'})")

    def write(self, frame: bytes) -> None:
        transport = self._transport
        if self._failure or transport is None:
            raise WorkerLost(self._failure or "the link to the engine is not open")
        transport.write(frame[self._send_now(frame, transport) :])
        if transport.get_write_buffer_size() > _COMMAND_BYTES_HELD:
            self._lose("the engine takes no commands")

    def _send_now(self, frame: bytes, transport: asyncio.Transport) -> int:
        """What the socket takes at once: uvloop's transport writes only when everything else of the loop's turn is done, and an idle
        engine would wait for that. Returns how many bytes."""
        if transport.get_write_buffer_size():
            return 0  # they go first
        with contextlib.suppress(OSError):  # the transport meets it too
            return self._inbox.send(frame, socket.MSG_DONTWAIT)
        return 0

    async def next_events(self) -> list[Event]:
        await self._arrived.wait()
        events = list(self._events)
        self._events.clear()
        if not self._failure:
            self._arrived.clear()
        elif not events:
            raise WorkerLost(self._failure)
        if self._transport is not None and not self._transport.is_reading() and not self._failure:
            self._transport.resume_reading()
        return events

    def close(self) -> None:
        self._lose("the link was closed")

    def _take(self, data: bytes) -> None:
        try:
            self._events.extend(EVENTS.decode(frame) for frame in self._reader.feed(data))
        except (FrameTooLarge, ValueError) as error:  # msgspec's DecodeError is a ValueError
            self._lose(f"the engine sent a frame that is none: {error}")
        self._arrived.set()

    def _lose(self, reason: str) -> None:
        self._failure = self._failure or reason
        self._arrived.set()
        if self._transport is not None:
            self._transport.abort()


async def _receive_ready(sock: socket.socket, reader: FrameReader) -> tuple[EngineReady, Arena, list[Event]]:
    arena_fds: list[int] = []
    while True:
        await _readable(sock)
        chunk, fds, _flags, _address = socket.recv_fds(sock, _RECEIVE_BYTES, 1)
        arena_fds += fds
        if not chunk:
            raise WorkerLost("the engine process ended before it was ready")
        events = [EVENTS.decode(frame) for frame in reader.feed(chunk)]
        if events:
            break
    ready = events[0]
    if not isinstance(ready, EngineReady) or not arena_fds:
        raise WorkerLost("the engine's first event must be EngineReady, with the arena's descriptor beside it")
    try:
        return ready, Arena(arena_fds[0], ready.layout), events[1:]
    finally:
        os.close(arena_fds[0])


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def resolve() -> None:
        if not readable.done():  # the loop may call twice before the waiter runs
            readable.set_result(None)

    loop.add_reader(sock, resolve)
    try:
        await readable
    finally:
        loop.remove_reader(sock)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Waits for the child, which was told to stop or lost its link; kills it past the deadline."""
    try:
        async with asyncio.timeout(_STOP_DEADLINE_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
