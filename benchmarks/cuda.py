"""The native engine on CUDA: correct against a float64 reference, then how fast. `make gpu`, or `python -m benchmarks.cuda`.

Needs torch, numpy, safetensors, msgspec, xxhash, pydantic and grpcio. Exit codes: 0 all well, 3 there is no CUDA device,
4 a check failed. `--device cpu` rehearses the checks without a GPU: it shows that they run, not that CUDA is right, and writes
no result.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.cuda_beside import DTYPES, WIDE, Beside, beside, check_beside
from benchmarks.cuda_checks import VARIANTS, Variant, check_engine, check_exports
from benchmarks.engine_driver import Device, EngineDriver, greedy
from benchmarks.random_model import DESCRIPTION, LLAMA_100M, LlamaShape, write_random_llama
from benchmarks.report import Measurement, Mode, measure, result, table, write_result
from engine.kv_memory import open_kv_memory
from engine.protocol import Layout

NO_DEVICE, CHECK_FAILED = 3, 4
THREADS = 4
# Each against the next: what varlen attention brings, and what graphs bring.
TIMED = (
    Variant("bfloat16", "auto", graphs=True),
    Variant("bfloat16", "auto", graphs=False),
    Variant("bfloat16", "torch", graphs=False),
    Variant("float32", "torch", graphs=True),
)
WARM_UP_STEPS = 10  # more than a bucket is asked for before it is recorded


@dataclass(frozen=True, slots=True)
class Sizes:
    """rounds: steps timed per batch. shared: (tokens of the prefix, sequences over it). export_blocks: per publication;
    busy_side: of the matrices multiplied beside it."""

    model: LlamaShape
    kv_bytes: int
    rounds: int
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    shared: tuple[int, int]
    export_blocks: int
    busy_side: int
    beside: Beside


FULL = Sizes(
    LLAMA_100M, 4 * 2**30, 100, (1, 8, 32, 128), (512, 2048, 8192), (4096, 32), 2048, 4096,
    Beside(WIDE, 4 * 2**30, decodes=32, context=512, prompts=20, prompt=4096, chunks=(512, 2048)),
)  # fmt: skip
QUICK = Sizes(
    LLAMA_100M, 4 * 2**30, 20, (1, 32), (512, 2048), (1024, 32), 512, 4096,
    Beside(LLAMA_100M, 4 * 2**30, decodes=32, context=512, prompts=5, prompt=4096, chunks=(2048,)),
)  # fmt: skip


class Prompts:
    """Random tokens, never the same twice."""

    def __init__(self, vocab: int) -> None:
        self._source = random.Random(4)
        self._vocab = vocab

    def take(self, tokens: int) -> list[int]:
        return [self._source.randrange(10, self._vocab) for _ in range(tokens)]


def decode_steps(driver: EngineDriver, prompts: list[list[int]], rounds: int) -> list[float]:
    """Milliseconds of whole steps that only decode, a token of each prompt."""
    keys = driver.begin_decode(prompts, rounds + len(prompts) + 64)
    for _ in range(WARM_UP_STEPS):
        driver.step_s()
    samples = [driver.step_s() * 1e3 for _ in range(rounds)]
    driver.cancel(keys)
    return samples


def speed(device: Device, variant: Variant, sizes: Sizes) -> list[Measurement]:
    prompts, measurements = Prompts(sizes.model.vocab), list[Measurement]()
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        model_dir = write_random_llama(Path(folder), sizes.model)
        driver = variant.open(model_dir, device, THREADS, sizes.kv_bytes)
        for batch in sizes.batches:
            samples = decode_steps(driver, [prompts.take(128) for _ in range(batch)], sizes.rounds)
            measurements.append(measure(f"{variant.name}: decode step, batch {batch}", "ms", samples))
        for tokens in sizes.prompts:
            driver.prefill_s(prompts.take(tokens))
            rates = [tokens / driver.prefill_s(prompts.take(tokens)) for _ in range(max(sizes.rounds // 10, 3))]
            measurements.append(measure(f"{variant.name}: prefill, {tokens} tokens", "tok/s", rates, "higher"))
        driver.close()
    return measurements


def shared_prefix(device: Device, variant: Variant, sizes: Sizes) -> Measurement:
    """On CUDA the blocks of the prefix are held once, and read once per sequence: attention is not shared there."""
    tokens, sequences = sizes.shared
    prompts = Prompts(sizes.model.vocab)
    prefix = prompts.take(tokens)
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        model_dir = write_random_llama(Path(folder), sizes.model)
        driver = variant.open(model_dir, device, THREADS, sizes.kv_bytes, reuse=True)
        driver.submit(prefix, greedy(1))
        driver.finish()
        samples = decode_steps(driver, [prefix + prompts.take(16) for _ in range(sequences)], sizes.rounds)
        driver.close()
    name = f"{variant.name}: decode step, batch {sequences} over one prefix of {tokens} tokens"
    return measure(name, "ms", samples)


def publication(device: Device, sizes: Sizes) -> list[Measurement]:
    """GB/s of KV from the pool to the arena, alone and beside matrix products; and those products alone and beside it."""
    page_bytes = 2 * 16 * sizes.model.kv_heads * sizes.model.head_dim * 2
    layout = Layout(
        layers=sizes.model.layers, blocks=sizes.export_blocks, page_tokens=16, kv_heads=sizes.model.kv_heads,
        head_dim=sizes.model.head_dim, dtype="bfloat16", block_bytes=page_bytes,
    )  # fmt: skip
    place = torch.device(device)
    memory, busy = (
        open_kv_memory(layout, place),
        partial(_products, torch.randn(sizes.busy_side, sizes.busy_side, device=place)),
    )
    size_gb = layout.layers * layout.blocks * layout.block_bytes / 1e9
    blocks, rounds = list(range(layout.blocks)), max(sizes.rounds // 10, 3)

    def publish() -> float:
        start_s = time.perf_counter()
        for layer in range(layout.layers):
            memory.publish(layer, blocks, lambda: None)
        memory.settle()
        return time.perf_counter() - start_s

    publish()
    alone = [size_gb / publish() for _ in range(rounds)]
    products = [_waited(busy, place) for _ in range(rounds)]
    beside = [_waited(lambda: (busy(), publish()), place) for _ in range(rounds)]
    memory.close()
    name = f"KV to the arena, {layout.blocks} blocks in {layout.layers} layers"
    return [
        measure(name, "GB/s", alone, "higher"),
        measure("matrix products alone", "ms", products),
        measure("matrix products and KV to the arena beside them", "ms", beside),
    ]


def _products(square: torch.Tensor) -> None:
    for _ in range(20):
        square @ square


def _waited(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds until the device has ended `work`."""
    start_s = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start_s) * 1e3


def checked(device: Device) -> tuple[list[Measurement], list[str]]:
    measurements: list[Measurement] = []
    failures = list(check_exports(device).failures)
    for variant in VARIANTS:
        one = check_engine(device, variant, THREADS)
        measurements += one.measurements
        failures += one.failures
    for dtype in DTYPES:
        one = check_beside(device, dtype, THREADS)
        measurements += one.measurements
        failures += one.failures
    return measurements, failures


def timed(device: Device, sizes: Sizes, variants: Sequence[Variant] = TIMED) -> list[Measurement]:
    measurements = [item for variant in variants for item in speed(device, variant, sizes)]
    measurements += [shared_prefix(device, variants[0], sizes), *publication(device, sizes)]
    return measurements + beside(device, sizes.beside, THREADS)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The native engine on CUDA: checks, then speed.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal of the checks")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here: nothing was checked or measured.", file=sys.stderr)
        return NO_DEVICE
    measurements, failures = checked(given.device)
    mode: Mode = "quick" if given.quick else "full"
    accelerator = ""
    if given.device == "cuda":
        measurements += timed("cuda", QUICK if given.quick else FULL)
        accelerator = torch.cuda.get_device_name()
    measured = result("cuda", mode, {"model": DESCRIPTION}, measurements, notes=failures, accelerator=accelerator)
    if given.device == "cuda":
        write_result(measured)
    print(table(measured))
    if given.device == "cpu":
        print("A rehearsal on the CPU, which has neither varlen attention nor graphs: nothing is known of CUDA by it.")
    print("\n".join(["FAILED", *failures]) if failures else "every check passed")
    return CHECK_FAILED if failures else 0


if __name__ == "__main__":
    sys.exit(main())
