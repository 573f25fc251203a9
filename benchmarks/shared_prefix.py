"""Hydragen: attention over a prefix that sequences share, read once against read by each; alone and in whole decode steps.

`python -m benchmarks.shared_prefix [--full] [--threads N]`. The peer is our own kernel without sharing, over the same blocks.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.command import add_threads, benchmark_parser, mode_of, publish
from benchmarks.engine_driver import EngineDriver
from benchmarks.random_model import LLAMA_100M, write_random_llama
from benchmarks.report import Measurement, Mode, Result, compare, result
from engine.attention_plan import Cut, Reader, plan
from engine.kernel_attention import ReaderBlocks, task_arrays
from engine.kernels.library import AttentionTasks, Kernels, load_kernels

PAGE, HEADS, KV_HEADS, DIM = 16, 12, 4, 64
SUFFIX = 128
BATCHES = (1, 4, 8, 16, 32, 64, 128)
PREFIXES = {"quick": (256, 1024, 4096), "full": (256, 1024, 4096, 16_384)}
STEP_PREFIXES = {"quick": (1024,), "full": (1024, 16_384)}
STEP_BATCH = 32
ROUNDS = {"quick": 5, "full": 15}
UNSHARED = "ours, every row by itself"


def readers_of(prefix: int, batch: int) -> list[Reader]:
    """Sequences of the same prefix, blocks and all, and a suffix of their own; each decodes one token."""
    own = SUFFIX // PAGE
    shared = np.arange(prefix // PAGE, dtype=np.int32)
    tails = [np.arange(own, dtype=np.int32) + len(shared) + row * own for row in range(batch)]
    return [Reader(row, 1, prefix + SUFFIX - 1, np.concatenate([shared, tail])) for row, tail in enumerate(tails)]


def tasks_of(kernels: Kernels, readers: Sequence[Reader], *, share: bool) -> AttentionTasks:
    ends = torch.tensor([reader.first + 1 for reader in readers], dtype=torch.int32)
    units = -(-2 * torch.get_num_threads() // KV_HEADS)
    tasks = plan(readers, Cut(kernels.chunk, PAGE, 0, units, share))
    return task_arrays(tasks, ReaderBlocks.of(readers), torch.zeros_like(ends), ends)


def alternate(calls: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Milliseconds of each call, taken in turn, so that a change of the machine's speed meets all of them."""
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, kept in zip(calls, samples, strict=True):
            start_s = time.perf_counter()
            call()
            kept.append((time.perf_counter() - start_s) * 1e3)
    return [kept[1:] for kept in samples]


def attention(kernels: Kernels, prefix: int, batch: int, rounds: int) -> Measurement:
    readers = readers_of(prefix, batch)
    pool = torch.randn((prefix + batch * SUFFIX) // PAGE, 2, PAGE, KV_HEADS, DIM)
    query = torch.randn(batch, HEADS, DIM)
    shared, alone = (tasks_of(kernels, readers, share=share) for share in (True, False))
    ours, theirs = alternate(
        [lambda: kernels.attention(query, pool, shared), lambda: kernels.attention(query, pool, alone)], rounds
    )
    assert torch.equal(kernels.attention(query, pool, shared), kernels.attention(query, pool, alone))
    return compare(f"attention, prefix {prefix}, batch {batch}", "ms", ours, (UNSHARED, theirs), "lower")


def steps(model_dir: Path, prefix: int, threads: int, rounds: int) -> list[Measurement]:
    """Decode steps of sequences behind one prefix: shared against not, and against no prefix at all, which is the floor."""
    source = random.Random(prefix)

    def prompt(tokens: int) -> list[int]:
        return [source.randrange(10, LLAMA_100M.vocab) for _ in range(tokens)]

    document, tails = prompt(prefix), [prompt(SUFFIX) for _ in range(STEP_BATCH)]
    kv_bytes = (prefix + (STEP_BATCH + 2) * (SUFFIX + 2 * rounds + 64)) * LLAMA_100M.kv_elements_per_token * 4
    drivers = [
        EngineDriver(model_dir, "cpu", "float32", threads=threads, kv_bytes=kv_bytes, share=share)
        for share in (True, False)
    ]
    floor = EngineDriver(model_dir, "cpu", "float32", threads=threads, kv_bytes=kv_bytes)
    for driver in drivers:
        driver.prefill_s(document)  # from here on its blocks are found
        driver.begin_decode([document + tail for tail in tails], rounds * 2 + STEP_BATCH + 32)
    floor.begin_decode(tails, rounds * 2 + STEP_BATCH + 32)
    ours, theirs, bare = alternate([drivers[0].step_s, drivers[1].step_s, floor.step_s], rounds)
    for driver in (*drivers, floor):
        driver.close()
    name = f"decode step, batch {STEP_BATCH}, shared prefix {prefix}"
    return [
        compare(name, "ms", ours, (UNSHARED, theirs), "lower"),
        compare(f"{name}: against no prefix", "ms", ours, ("the same rows without the prefix", bare), "lower"),
    ]


def run(mode: Mode, threads: int) -> Result:
    kernels = load_kernels()
    if kernels is None:
        raise SystemExit("The kernels are not built: python -m engine.kernels.build")
    torch.set_num_threads(threads)
    measured = [attention(kernels, p, b, ROUNDS[mode]) for p in PREFIXES[mode] for b in BATCHES]
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        model_dir = write_random_llama(Path(folder))
        for prefix in STEP_PREFIXES[mode]:
            measured += steps(model_dir, prefix, threads, ROUNDS[mode])
    settings: dict[str, str | int | float | bool] = {
        "threads": threads,
        "instruction_set": kernels.instruction_set,
        "heads": f"{HEADS}/{KV_HEADS}x{DIM}",
        "suffix": SUFFIX,
        "page_tokens": PAGE,
        "chunk_tokens": kernels.chunk,
        "dtype": "float32",
    }
    notes = (
        "shared and unshared results were compared bit for bit; below one chunk of common tokens nothing is shared",
    )
    return result("shared_prefix", mode, settings, measured, notes=notes)


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Attention over shared prefixes, with and without sharing.")
    add_threads(parser)
    given = parser.parse_args(arguments)
    publish(run(mode_of(given), given.threads))


if __name__ == "__main__":
    main()
