"""One of our transports, as a contender of `benchmarks/transfer_peers.py`: arguments transport and profile.

Connection.send and recv alone, as in `benchmarks/transfer.py`: no hand-off protocol, no checksums.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

import uvloop

from benchmarks.transfer import Profile, open_sink
from benchmarks.transfer_child import MESSAGE_BYTES, MESSAGES, cpu_s
from kv_transfer.arena import Arena, ArenaShape


async def main(name: str, profile: Profile) -> None:
    arena = Arena.anonymous(ArenaShape(1, MESSAGES, MESSAGE_BYTES))
    arena.prefault()
    data = arena.whole()
    data[:] = b"\x01" * len(data)
    async with open_sink(name, profile) as sink:
        await sink.push(data, MESSAGES, MESSAGE_BYTES)
        print("ready", flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            pids = (os.getpid(), sink.pid)
            before_s, start_s = sum(map(cpu_s, pids)), time.perf_counter()
            await sink.push(data, MESSAGES, MESSAGE_BYTES)
            elapsed_s = time.perf_counter() - start_s
            print(elapsed_s, sum(map(cpu_s, pids)) - before_s, flush=True)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], "tcp" if sys.argv[2] == "tcp" else "host"))
