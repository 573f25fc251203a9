"""Hydragen: attention over a prefix that sequences share, read once against read by each; alone, in decode steps and in prefills.

`python -m benchmarks.shared_prefix [--full] [--threads N] [--dtype float32|bfloat16]`. The peer is our own kernel without sharing,
over the same blocks. One thread is bound to each of the same cores.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.bound_cores import add_cores, require_bound
from benchmarks.command import add_threads, benchmark_parser, mode_of, publish
from benchmarks.engine_driver import Dtype, EngineDriver, greedy
from benchmarks.floors import MemoryFloor
from benchmarks.prefix_tree import DIM, HEADS, KV_HEADS, PAGE, SUFFIX, PrefixTree, fitted, tasks_of
from benchmarks.random_model import LLAMA_100M, write_random_llama
from benchmarks.report import Measurement, Mode, Result, compare, measure, result
from engine.kernels.library import Kernels, load_kernels
from engine.kv_memory import TORCH_DTYPES

BATCHES = (1, 4, 8, 16, 32, 64, 128)
PREFIXES = {"quick": (256, 1024, 4096), "full": (256, 1024, 4096, 16_384)}
TREES = {
    "tree: 1K shared by 32, 3K more by each 8 of them": PrefixTree(1024, 8, 3072, 4),
    "tree: 1K shared by 64, 3K more by each 2 of them": PrefixTree(1024, 2, 3072, 32),
    "tree: 4K shared by 128, 1K more by each 8 of them": PrefixTree(4096, 8, 1024, 16),
}
DOCUMENT = 4096  # of the prefills
CHUNK = 768  # the least that is shared
# (tokens in common, prompts, tokens of each in the step): those of a step's budget, from short questions to whole chunks of a long
# one. And a few prompts over little, where sharing pays little or nothing (engine.step_work).
PREFILLS = (
    *((DOCUMENT, *step) for step in ((32, 4), (32, 16), (32, 17), (32, 64), (4, 512))),
    *((CHUNK, *step) for step in ((2, 10), (2, 12), (3, 10), (3, 16), (4, 16))),
)
# (prompts, tokens of each behind the document), through the engine
QUESTIONS: dict[Mode, tuple[tuple[int, int], ...]] = {"quick": ((8, 16),), "full": ((32, 16), (32, 64))}
STEP_PREFIXES = {"quick": (1024,), "full": (1024, 16_384)}
STEP_BATCH = 32
ROUNDS = {"quick": 5, "full": 15}
UNSHARED = "ours, every row by itself"
ONCE = "memory floor: reading the weights and every block of KV once"


def alternate(calls: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Milliseconds of each call, taken in turn, so that a change of the machine's speed meets all of them."""
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, kept in zip(calls, samples, strict=True):
            start_s = time.perf_counter()
            call()
            kept.append((time.perf_counter() - start_s) * 1e3)
    return [kept[1:] for kept in samples]


def attention(kernels: Kernels, name: str, tree: PrefixTree, rounds: int, dtype: torch.dtype) -> Measurement:
    """One layer."""
    readers = tree.readers()
    pool = torch.randn(tree.pages, 2, PAGE, KV_HEADS, DIM).to(dtype)
    query = torch.randn(tree.sequences * tree.rows, HEADS, DIM)
    costs = fitted(kernels, dtype)
    shared, alone = (tasks_of(kernels, readers, costs, share=share) for share in (True, False))
    ours, theirs = alternate(
        [lambda: kernels.attention(query, pool, shared), lambda: kernels.attention(query, pool, alone)], rounds
    )
    assert torch.equal(kernels.attention(query, pool, shared), kernels.attention(query, pool, alone))
    return compare(name, "ms", ours, (UNSHARED, theirs), "lower")


def attentions(kernels: Kernels, mode: Mode, dtype: torch.dtype) -> list[Measurement]:
    flat = {
        f"attention, prefix {prefix}, batch {batch}": PrefixTree(prefix, batch)
        for prefix in PREFIXES[mode]
        for batch in BATCHES
    }
    trees = {f"attention, {name}": tree for name, tree in TREES.items()}
    prefills = {
        f"attention of a prefill, document {document}: {rows} tokens of each of {prompts} prompts": PrefixTree(
            document, prompts, rows=rows
        )
        for document, prompts, rows in PREFILLS
    }
    return [attention(kernels, name, tree, ROUNDS[mode], dtype) for name, tree in {**flat, **trees, **prefills}.items()]


@dataclass(frozen=True, slots=True)
class Model:
    directory: Path
    dtype: Dtype  # of weights and KV
    threads: int

    @property
    def element_bytes(self) -> int:
        return TORCH_DTYPES[self.dtype].itemsize

    def driver(self, tokens: int, share: bool | None) -> EngineDriver:
        """With a pool of so many tokens."""
        kv_bytes = tokens * LLAMA_100M.kv_elements_per_token * self.element_bytes
        return EngineDriver(self.directory, "cpu", self.dtype, threads=self.threads, kv_bytes=kv_bytes, share=share)

    def drivers(self, tokens: int) -> list[EngineDriver]:
        """With and without sharing."""
        return [self.driver(tokens, share) for share in (True, False)]


def random_tokens(source: random.Random, count: int) -> list[int]:
    return [source.randrange(10, LLAMA_100M.vocab) for _ in range(count)]


def steps(model: Model, prefix: int, rounds: int) -> list[Measurement]:
    """Decode steps of sequences behind one prefix: shared against not, against no prefix at all, and against the memory's speed."""
    source = random.Random(prefix)
    document, tails = random_tokens(source, prefix), [random_tokens(source, SUFFIX) for _ in range(STEP_BATCH)]
    output = 2 * rounds + STEP_BATCH + 32
    pool = prefix + (STEP_BATCH + 2) * (SUFFIX + output)
    drivers, bare_driver = model.drivers(pool), model.driver(pool, None)
    for driver in drivers:
        driver.prefill_s(document)  # from here on its blocks are found
        driver.begin_decode([document + tail for tail in tails], output)
    bare_driver.begin_decode(tails, output)
    floor = MemoryFloor(LLAMA_100M, TORCH_DTYPES[model.dtype])
    floor.begin([document, *tails])
    calls = [*(driver.step_s for driver in (*drivers, bare_driver)), lambda: floor.steps_s(1)]
    ours, theirs, bare, once = alternate(calls, rounds)
    for driver in (*drivers, bare_driver):
        driver.close()
    name = f"decode step, batch {STEP_BATCH}, shared prefix {prefix}"
    elements = LLAMA_100M.parameters + (prefix + STEP_BATCH * SUFFIX) * LLAMA_100M.kv_elements_per_token
    read_gb = model.element_bytes * elements / 1e9
    return [
        compare(name, "ms", ours, (UNSHARED, theirs), "lower"),
        compare(f"{name}: against no prefix", "ms", ours, ("the same rows without the prefix", bare), "lower"),
        compare(f"{name}: against the memory floor", "ms", ours, (ONCE, once), "lower"),
        measure(f"{name}: memory read by that floor", "GB/s", [read_gb / (ms / 1e3) for ms in once], "higher"),
    ]


def prefills(model: Model, prompts: int, question: int, rounds: int) -> Measurement:
    """Through the engine: from submission until each of `prompts` over one cached document has its first token."""
    source = random.Random(question)
    document = random_tokens(source, DOCUMENT)
    drivers = model.drivers(2 * DOCUMENT + (rounds + 2) * prompts * (question + 2 * PAGE))

    def answer(driver: EngineDriver) -> None:
        for _ in range(prompts):
            driver.submit(document + random_tokens(source, question), greedy(1))
        driver.finish()

    for driver in drivers:
        driver.prefill_s(document)
    ours, theirs = alternate([lambda: answer(drivers[0]), lambda: answer(drivers[1])], rounds)
    for driver in drivers:
        driver.close()
    name = f"prefill of {prompts} prompts of {question} tokens behind one cached document of {DOCUMENT}"
    return compare(name, "ms", ours, (UNSHARED, theirs), "lower")


def run(mode: Mode, dtype: Dtype, threads: int) -> Result:
    kernels = load_kernels(dtype=TORCH_DTYPES[dtype])
    if kernels is None:
        raise SystemExit("The kernels are not built: python -m engine.kernels.build")
    torch.set_num_threads(threads)
    measured = attentions(kernels, mode, TORCH_DTYPES[dtype])
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        model = Model(write_random_llama(Path(folder)), dtype, threads)
        for prefix in STEP_PREFIXES[mode]:
            measured += steps(model, prefix, ROUNDS[mode])
        measured += [prefills(model, *question, ROUNDS[mode]) for question in QUESTIONS[mode]]
    settings: dict[str, str | int | float | bool] = {
        "threads": threads,
        "instruction_set": kernels.instruction_set,
        "heads": f"{HEADS}/{KV_HEADS}x{DIM}",
        "suffix": SUFFIX,
        "page_tokens": PAGE,
        "chunk_tokens": kernels.chunk,
        "dtype": dtype,
    }
    notes = (
        "shared and unshared results were compared bit for bit; below one chunk of common tokens nothing is shared",
        "sequences that compute more than 16 tokens in a step share nothing in it: their rows fill the vectors by themselves",
        "nor do those for whom the costs fitted on this machine say that it is no faster: the same tasks are measured twice",
    )
    name = "shared_prefix" if dtype == "float32" else f"shared_prefix_{dtype}"
    return result(name, mode, settings, measured, notes=notes)


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Attention over shared prefixes, with and without sharing.")
    add_threads(parser)
    add_cores(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args(arguments)
    require_bound(parser, given, "benchmarks.shared_prefix", sys.argv[1:] if arguments is None else arguments)
    publish(run(mode_of(given), given.dtype, given.threads))


if __name__ == "__main__":
    main()
