"""Mooncake's transfer engine over TCP, as a contender of `benchmarks/transfer_peers.py`: no argument (or passive, the other side)."""

from __future__ import annotations

import importlib
import os
import sys

from benchmarks.transfer_child import (
    MESSAGE_BYTES,
    TOTAL_BYTES,
    answer,
    filled_memory,
    line_of,
    start_other_side,
    stdin_line,
    tell,
)

HOST = "127.0.0.1"


def quiet_stdout() -> None:
    """The library logs to stdout: what is ours goes to a copy of it."""
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(ours, "w")


def passive() -> None:
    engine = importlib.import_module("mooncake.engine").TransferEngine()
    engine.initialize(HOST, "P2PHANDSHAKE", "tcp", "")
    memory, address = filled_memory(7)
    engine.register_memory(address, TOTAL_BYTES)
    print(address, engine.get_rpc_port(), flush=True)
    while (line := stdin_line(1.0)) != "":
        if line is not None:
            print(memory[0] + memory[-1], flush=True)


def active() -> None:
    engine = importlib.import_module("mooncake.engine").TransferEngine()
    engine.initialize(HOST, "P2PHANDSHAKE", "tcp", "")
    other = start_other_side("benchmarks.mooncake_transfer")
    _memory, address = filled_memory(1)
    engine.register_memory(address, TOTAL_BYTES)
    there, port = line_of(other).split()
    spans = range(0, TOTAL_BYTES, MESSAGE_BYTES)

    def transfer() -> None:
        local, remote = [address + at for at in spans], [int(there) + at for at in spans]
        if engine.batch_transfer_sync_write(f"{HOST}:{port}", local, remote, [MESSAGE_BYTES] * len(spans)):
            raise RuntimeError("Mooncake: the transfer failed")

    transfer()
    tell(other, "check")
    assert int(line_of(other)) == 2
    answer(transfer, other)


if __name__ == "__main__":
    quiet_stdout()
    passive() if sys.argv[1:] == ["passive"] else active()
