"""Owns the engine's end of the socket to its io process: commands in, events out. Blocking sockets, one thread."""

from __future__ import annotations

import select
import socket

from engine.protocol import COMMANDS, ENCODER, Command, EngineReady, Event
from worker_runtime.framing import FrameReader, encode_frame

_RECEIVE_BYTES = 1 << 20
_SEND_DEADLINE_S = 60.0  # an io process that takes nothing for so long is gone or frozen


class IoProcessLost(Exception):
    """The io process closed its end or takes nothing any more: the engine process must end."""


class EngineChannel:
    """Also the EventSink of the engine: `emit` buffers, `flush` writes everything in one call."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.settimeout(_SEND_DEADLINE_S)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._reader = FrameReader()
        self._outgoing = bytearray()

    def announce(self, ready: EngineReady, arena_fd: int) -> None:
        """Sends the first event with the arena's file descriptor beside it."""
        frame = encode_frame(ENCODER.encode(ready))
        sent = socket.send_fds(self._sock, [frame], [arena_fd])
        self._sock.sendall(frame[sent:])

    def first_frame(self, deadline_s: float) -> bytes:
        """The start-up frame. Nothing else may follow it before `announce`."""
        while self._wait(deadline_s):
            frames = self._reader.feed(self._read())
            if frames:
                return frames[0]
        raise IoProcessLost(f"no start-up frame within {deadline_s} s")

    def receive(self, wait_s: float) -> list[Command]:
        """Commands that have arrived; waits up to `wait_s` for the first. Raises IoProcessLost at EOF."""
        commands: list[Command] = []
        while self._wait(wait_s):
            commands.extend(COMMANDS.decode(frame) for frame in self._reader.feed(self._read()))
            wait_s = 0.0
        return commands

    def emit(self, event: Event) -> None:
        self._outgoing += encode_frame(ENCODER.encode(event))

    def flush(self) -> None:
        if not self._outgoing:
            return
        try:
            self._sock.sendall(self._outgoing)
        except OSError as error:  # TimeoutError and BrokenPipeError among them
            raise IoProcessLost(f"the io process takes no events: {error}") from error
        self._outgoing.clear()

    def _wait(self, wait_s: float) -> bool:
        return bool(self._poll.poll(wait_s * 1000))

    def _read(self) -> bytes:
        try:
            chunk = self._sock.recv(_RECEIVE_BYTES)
        except ConnectionError as error:
            raise IoProcessLost(str(error)) from error
        if not chunk:
            raise IoProcessLost("the io process closed the link")
        return chunk
