"""Owns engine processes that misbehave, for the tests of the link: `python -m tests.worker.link_children KIND FD PID`."""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import time

from engine.page_protocol import PagesSaved
from engine.protocol import ENCODER, Load
from simulator.modelled_engine import ModelledConfig, ModelledEngine
from worker_runtime.engine_channel import EngineChannel
from worker_runtime.framing import MAX_FRAME_BYTES


def main(kind: str, link_fd: int) -> None:
    sock = socket.socket(fileno=link_fd)
    channel = EngineChannel(sock)
    channel.first_frame(5.0)
    if kind == "silent":
        time.sleep(60)
    elif kind == "wrong-first-event":
        channel.emit(numbered(0))
        channel.flush()
    elif kind != "exits":
        engine = ModelledEngine(ModelledConfig(), channel)
        channel.announce(engine.ready(), engine.arena_fd)
        misbehave(kind, sock, channel)


def misbehave(kind: str, sock: socket.socket, channel: EngineChannel) -> None:
    if kind == "oversize":
        sock.sendall(struct.pack("<I", MAX_FRAME_BYTES + 1))
    elif kind == "garbage":
        sock.sendall(struct.pack("<I", 3) + b"\xff\xff\xff")
    elif kind == "bursts":
        for step in range(1000):
            channel.emit(numbered(step))
        channel.flush()
    elif kind == "last-words":
        channel.receive(60.0)
        for step in range(1000):
            channel.emit(numbered(step))
        channel.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "counts-commands":
        count_commands(channel)
    elif kind == "ignores-stop":
        time.sleep(60)
    elif kind == "half-a-frame":
        payload = ENCODER.encode(numbered(0))
        sock.sendall(struct.pack("<I", len(payload)) + payload[:-1])
        os._exit(1)
    channel.receive(60.0)


def count_commands(channel: EngineChannel) -> None:
    """Tells each command's number as long as none is missing; they are PagesSaved of that many blocks."""
    seen = 0
    while True:
        for command in channel.receive(60.0):
            if not isinstance(command, PagesSaved) or len(command.blocks) != seen:
                os._exit(1)
            channel.emit(numbered(seen))
            seen += 1
        channel.flush()


def numbered(step: int) -> Load:
    return Load(step, 1, 1, 0, 0, 0, 0, 0, 0.0, 0, 0, 0, 0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
