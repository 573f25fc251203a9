"""Engine against transformers: decode milliseconds per step and prefill tokens per second, interleaved in one process.

`python -m benchmarks.engine [--full] [--threads N] [--dtype float32|bfloat16]`. Ours is the whole engine step (scheduling, block
tables, sampling, events), the peer's is the bare forward pass and an argmax. `benchmarks.peers` adds vLLM and the floors.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.command import add_threads, benchmark_parser, mode_of, publish
from benchmarks.engine_driver import Device, Dtype
from benchmarks.our_engine import OurEngine
from benchmarks.random_model import DESCRIPTION, write_random_llama
from benchmarks.report import Mode, Result, compare, result
from benchmarks.rounds import DECODE_CONTEXT, Effort, decode_ms, prefill_rates
from benchmarks.transformers_peer import TransformersPeer

BATCHES = (1, 8, 32)
PROMPTS = (512, 2048)
EFFORTS: dict[Mode, Effort] = {"quick": Effort(3, 4, 2, 2.0, 10.0), "full": Effort(10, 8, 7, 4.0, 60.0)}


def run(mode: Mode, threads: int, dtype: Dtype, device: Device = "cpu") -> Result:
    effort = EFFORTS[mode]
    measurements = []
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        model_dir = write_random_llama(Path(folder))
        engine = OurEngine(model_dir, dtype, threads, device)
        torch.set_num_threads(threads)
        peer = TransformersPeer(model_dir, getattr(torch, dtype), device)
        for batch in BATCHES:
            ours, theirs = decode_ms([engine, peer], batch, effort)
            measurements.append(compare(f"decode step, batch {batch}", "ms", ours, (peer.name, theirs), "lower"))
        for tokens in PROMPTS:
            ours, theirs = prefill_rates([engine, peer], tokens, effort)
            measurements.append(compare(f"prefill, {tokens} tokens", "tok/s", ours, (peer.name, theirs), "higher"))
        engine.close()
    settings: dict[str, str | int | float | bool] = {
        "model": DESCRIPTION,
        "dtype": dtype,
        "threads": threads,
        "decode_context": DECODE_CONTEXT,
    }
    notes = ("ours: whole engine step with the default prefill chunk; peer: forward pass and argmax, unchunked",)
    return result("engine", mode, settings, measurements, notes=notes)


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Engine against transformers.")
    add_threads(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args(arguments)
    publish(run(mode_of(given), given.threads, given.dtype))


if __name__ == "__main__":
    main()
