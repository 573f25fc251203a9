"""NIXL used directly, as a contender of `benchmarks/transfer_peers.py`: argument READ or WRITE (or passive, the other side).

One request with a descriptor per message, memory registered before. No progress threads: both sides poll while bytes move.
"""

from __future__ import annotations

import importlib
import sys

from benchmarks.transfer_child import (
    MESSAGE_BYTES,
    MESSAGES,
    TOTAL_BYTES,
    answer,
    filled_memory,
    line_of,
    start_other_side,
    stdin_line,
    tell,
)


def passive() -> None:
    api = importlib.import_module("nixl._api")
    agent = api.nixl_agent("passive", api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    memory, address = filled_memory(7)
    agent.register_memory([(address, TOTAL_BYTES, 0, "")], "DRAM")
    print(address, agent.get_agent_metadata().hex(), flush=True)
    moving = False
    while (line := stdin_line(0.0 if moving else 0.01)) != "":
        if line == "check\n":
            print(memory[0] + memory[-1], flush=True)
        elif line is not None:
            moving = line == "moves\n"
        for _ in range(100 if moving else 1):
            agent.get_new_notifs()


def active(operation: str) -> None:
    api = importlib.import_module("nixl._api")
    agent = api.nixl_agent("active", api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    other = start_other_side("benchmarks.nixl_transfer")
    memory, address = filled_memory(1)
    agent.register_memory([(address, TOTAL_BYTES, 0, "")], "DRAM")
    there, metadata = line_of(other).split()
    peer = agent.add_remote_agent(bytes.fromhex(metadata))
    spans = range(0, TOTAL_BYTES, MESSAGE_BYTES)
    assert len(spans) == MESSAGES

    def transfer() -> None:
        local = agent.get_xfer_descs([(address + at, MESSAGE_BYTES, 0) for at in spans], "DRAM")
        remote = agent.get_xfer_descs([(int(there) + at, MESSAGE_BYTES, 0) for at in spans], "DRAM")
        tell(other, "moves")
        request = agent.initialize_xfer(operation, local, remote, peer)
        state = agent.transfer(request)
        while state == "PROC":
            state = agent.check_xfer_state(request)
        tell(other, "rests")
        agent.release_xfer_handle(request)
        if state != "DONE":
            raise RuntimeError(f"NIXL: {state}")

    transfer()
    tell(other, "check")
    assert (memory[0] + memory[-1], int(line_of(other))) == ((14, 14) if operation == "READ" else (2, 2))
    answer(transfer, other)


if __name__ == "__main__":
    passive() if sys.argv[1] == "passive" else active(sys.argv[1])
