"""The native engine on CUDA: correct against a float64 reference, then how fast. `make gpu`, or `python -m benchmarks.cuda`.

Needs torch, numpy, safetensors, msgspec, xxhash and pydantic, nothing else. Exit codes: 0 all well, 3 there is no CUDA device,
4 a check failed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.engine_driver import Device, Dtype, EngineDriver, greedy
from benchmarks.random_model import LLAMA_100M, LlamaShape, write_random_llama
from benchmarks.reference_llama import ReferenceLlama
from benchmarks.report import Measurement, Mode, measure, result, table, write_result

CHECKED = LlamaShape(layers=4, hidden=256, heads=8, kv_heads=2, head_dim=64, intermediate=512, vocab=2000)
CHECKED_PROMPTS = (1, 15, 16, 17, 130, 600)
CHECKED_OUTPUT = 24
TOLERANCES: dict[Dtype, float] = {"float32": 1e-3, "bfloat16": 0.15}  # of a log-probability
DECODE_BATCHES = (1, 8, 32, 128)
PREFILL_TOKENS = (512, 2048)
NO_DEVICE, CHECK_FAILED = 3, 4


@dataclass(frozen=True, slots=True)
class Deviation:
    """Largest differences over all positions, of the engine from the reference. Natural log."""

    drawn: float  # log-probability of the token drawn
    regret: float  # how much more likely the reference's best token is than the one drawn


def deviation(reference: ReferenceLlama, prompt: Sequence[int], driver: EngineDriver, key: int) -> Deviation:
    """Compares the greedy output under `key` with the reference run over prompt + output."""
    output, rows = driver.sink.token_ids[key], driver.sink.logprobs[key]
    expected = reference.log_probabilities([*prompt, *output])[len(prompt) - 1 : -1]
    drawn = expected.gather(1, torch.tensor(output)[:, None])[:, 0]
    given = torch.tensor([row.logprobs[0] for row in rows], dtype=drawn.dtype)
    return Deviation((drawn - given).abs().max().item(), (expected.max(1).values - drawn).max().item())


def check(device: Device, dtype: Dtype, threads: int) -> list[Measurement]:
    """All prompts in one batch: chunks, page borders and mixed steps are then all taken."""
    source = random.Random(3)
    prompts = [[source.randrange(10, CHECKED.vocab) for _ in range(tokens)] for tokens in CHECKED_PROMPTS]
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        model_dir = write_random_llama(Path(folder), CHECKED)
        driver = EngineDriver(model_dir, device, dtype, threads=threads, kv_bytes=64 * 2**20)
        keys = [driver.submit(prompt, greedy(CHECKED_OUTPUT, logprobs=1)) for prompt in prompts]
        driver.finish()
        reference = ReferenceLlama(model_dir, CHECKED)
        found = [deviation(reference, prompt, driver, key) for prompt, key in zip(prompts, keys, strict=True)]
        driver.close()
    return [
        measure(f"{dtype}: |logprob - float64|", "nat", [item.drawn for item in found]),
        measure(f"{dtype}: regret of the drawn token", "nat", [item.regret for item in found]),
    ]


def failures(checks: Sequence[Measurement], tolerance: float) -> list[str]:
    return [f"{item.name} is {item.figure.high:.3g}" for item in checks if not item.figure.high <= tolerance]


def speed(device: Device, dtype: Dtype, threads: int, rounds: int) -> list[Measurement]:
    source = random.Random(4)

    def prompt(tokens: int) -> list[int]:
        return [source.randrange(10, LLAMA_100M.vocab) for _ in range(tokens)]

    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        driver = EngineDriver(write_random_llama(Path(folder)), device, dtype, threads=threads, kv_bytes=2 * 2**30)
        for batch in DECODE_BATCHES:
            keys = driver.begin_decode([prompt(128) for _ in range(batch)], rounds + batch + 64)
            for _ in range(10):
                driver.step_s()
            samples = [driver.step_s() * 1e3 for _ in range(rounds)]
            measurements.append(measure(f"{dtype}: decode step, batch {batch}", "ms", samples))
            driver.cancel(keys)
        for tokens in PREFILL_TOKENS:
            driver.prefill_s(prompt(tokens))
            rates = [tokens / driver.prefill_s(prompt(tokens)) for _ in range(max(rounds // 10, 3))]
            measurements.append(measure(f"{dtype}: prefill, {tokens} tokens", "tok/s", rates, "higher"))
        driver.close()
    return measurements


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The native engine on CUDA: checks, then speed.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("There is no CUDA device here: nothing was checked or measured.", file=sys.stderr)
        return NO_DEVICE
    mode: Mode = "quick" if given.quick else "full"
    measurements: list[Measurement] = []
    failed: list[str] = []
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        checks = check("cuda", dtype, threads=4)
        failed += failures(checks, TOLERANCES[dtype])
        measurements += [*checks, *speed("cuda", dtype, 4, 20 if given.quick else 100)]
    measured = result("cuda", mode, {}, measurements, notes=failed, accelerator=torch.cuda.get_device_name())
    write_result(measured)
    print(table(measured))
    print("FAILED" if failed else "every check passed")
    return CHECK_FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
