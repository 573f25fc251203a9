"""Engine against transformers: decode milliseconds per step and prefill tokens per second, interleaved in one process.

`python -m benchmarks.engine [--full] [--threads N] [--dtype float32|bfloat16]`. Ours is the whole engine step (scheduling, block
tables, sampling, events), the peer's is the bare forward pass and an argmax.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.engine_driver import Device, Dtype, EngineDriver
from benchmarks.random_model import LLAMA_100M, write_random_llama
from benchmarks.report import Measurement, Mode, Result, compare, result, table, write_result
from benchmarks.transformers_peer import NAME, TransformersPeer

BATCHES = (1, 8, 32)
PROMPTS = (512, 2048)
DECODE_CONTEXT = 128
KV_BYTES = 768 * 2**20


@dataclass(frozen=True, slots=True)
class Effort:
    decode_rounds: int
    decode_steps: int  # per round
    prefill_rounds: int


EFFORTS: dict[Mode, Effort] = {"quick": Effort(3, 4, 2), "full": Effort(10, 8, 7)}


def random_prompt(source: random.Random, tokens: int) -> list[int]:
    return [source.randrange(10, LLAMA_100M.vocab) for _ in range(tokens)]


def decode(ours: EngineDriver, peer: TransformersPeer, batch: int, effort: Effort) -> Measurement:
    source = random.Random(batch)
    prompts = [random_prompt(source, DECODE_CONTEXT) for _ in range(batch)]
    steps = effort.decode_rounds * effort.decode_steps
    keys = ours.begin_decode(prompts, steps + batch + 16)
    peer.prefill_s(prompts)
    ours.step_s(), peer.step_s()  # the first step of a batch shape pays for its buffers
    our_ms: list[float] = []
    peer_ms: list[float] = []
    for _ in range(effort.decode_rounds):
        our_ms += [ours.step_s() * 1e3 for _ in range(effort.decode_steps)]
        peer_ms += [peer.step_s() * 1e3 for _ in range(effort.decode_steps)]
    ours.cancel(keys)
    return compare(f"decode step, batch {batch}", "ms", our_ms, (NAME, peer_ms), "lower")


def prefill(ours: EngineDriver, peer: TransformersPeer, tokens: int, effort: Effort) -> Measurement:
    source = random.Random(tokens)
    ours.prefill_s(random_prompt(source, tokens))
    peer.prefill_s([random_prompt(source, tokens)])
    our_rate: list[float] = []
    peer_rate: list[float] = []
    for _ in range(effort.prefill_rounds):
        prompt = random_prompt(source, tokens)
        our_rate.append(tokens / ours.prefill_s(prompt))
        peer_rate.append(tokens / peer.prefill_s([prompt]))
    return compare(f"prefill, {tokens} tokens", "tok/s", our_rate, (NAME, peer_rate), "higher")


def run(mode: Mode, threads: int, dtype: Dtype, device: Device = "cpu") -> Result:
    effort = EFFORTS[mode]
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        model_dir = write_random_llama(Path(folder))
        ours = EngineDriver(model_dir, device, dtype, threads=threads, kv_bytes=KV_BYTES)
        torch.set_num_threads(threads)
        peer = TransformersPeer(model_dir, torch.float32 if dtype == "float32" else torch.bfloat16, device)
        measurements = [decode(ours, peer, batch, effort) for batch in BATCHES]
        measurements += [prefill(ours, peer, tokens, effort) for tokens in PROMPTS]
        ours.close()
    settings: dict[str, str | int | float | bool] = {
        "model": "random Llama, 12 layers, hidden 768, 12/4 heads of 64, ffn 2048, vocabulary 32,000, tied",
        "dtype": dtype,
        "threads": threads,
        "decode_context": DECODE_CONTEXT,
    }
    notes = ("ours: whole engine step with the default prefill chunk; peer: forward pass and argmax, unchunked",)
    return result("engine", mode, settings, measurements, notes=notes)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Engine against transformers.")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args(arguments)
    measured = run("full" if given.full else "quick", given.threads, given.dtype)
    write_result(measured)
    print(table(measured))


if __name__ == "__main__":
    main()
