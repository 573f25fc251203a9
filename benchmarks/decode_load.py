"""A native engine that decodes a batch without end, in a process of its own: argument the folder to write the random model into.

Each line on stdin is answered with the milliseconds of every step since the last one. End of stdin ends it.
"""

from __future__ import annotations

import random
import select
import sys
from pathlib import Path

from benchmarks.our_engine import OurEngine
from benchmarks.random_model import write_random_llama
from benchmarks.rounds import DECODE_CONTEXT, random_prompt

BATCH = 8
THREADS = 2
STEPS_PER_TURN = 400  # then the batch begins anew, so that its context stays about the same


def main(folder: Path) -> None:
    engine = OurEngine(write_random_llama(folder), "float32", THREADS)
    source = random.Random(BATCH)
    taken: list[float] = []
    while True:
        engine.begin([random_prompt(source, DECODE_CONTEXT) for _ in range(BATCH)])
        for _ in range(STEPS_PER_TURN):
            taken += engine.steps_s(1)
            if not select.select([sys.stdin], [], [], 0)[0]:
                continue
            if not sys.stdin.readline():
                return
            print(*(f"{seconds * 1e3:.3f}" for seconds in taken), flush=True)
            taken = []
        engine.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
