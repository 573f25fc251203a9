"""What the approximations that operators may switch on cost the shipped model: a narrower KV pool, and blended chunks.

`python -m benchmarks.approximations [--full] [--threads N]`. KL divergence of the next token's distribution from the exact one, in
nats. Narrower pools: over every position of text held out of the model's training. Blended chunks: the check that
`pdserve verify --blend` makes, with its built-in prompts. Nothing is timed; both modes compute the same.
"""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from tokenizers import Tokenizer

from benchmarks.command import add_threads, benchmark_parser, mode_of, publish
from benchmarks.engine_driver import EngineDriver, greedy
from benchmarks.live_cluster import PDSERVE, live_cluster
from benchmarks.report import Measurement, Mode, Result, measure, result
from service_kit.config import EngineConfig, ModelConfig
from training.corpus import read_corpus

SHIPPED = Path(__file__).resolve().parent.parent / "models" / "pdserve-tiny"
EXACT_KV = "float32"
NARROW_KV = ("bfloat16", "float8_e4m3")
DOCUMENT_TOKENS = 128  # of each held-out document
VOCABULARY = 4096
POOL_BYTES = 16 * 2**20
VERIFY_S = 180.0
VERIFY_DONE = (0, 4)  # passed, or failed as a check does


@dataclass(frozen=True, slots=True)
class Drift:
    """How far the distributions of the next token lie from the exact ones. KL(exact ‖ narrow) in nats."""

    mean_kl: float
    kl_p99: float
    same_likeliest: float  # share of positions
    positions: int


class _Figures(msgspec.Struct):
    mean_kl_nats: float
    max_kl_nats: float
    top1_agreement: float


class _Check(_Figures):
    """What `pdserve verify --blend -o json` says, as far as it is told here."""

    blended_prompts: int
    ratio: float
    naive_reuse: _Figures


def distributions(kv_dtype: str, threads: int) -> torch.Tensor:
    """Log-probabilities at every position of the held-out text, float64 [positions, vocabulary]. Weights are computed in float32."""
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    settings = {"kv_bytes": POOL_BYTES, "threads": threads, "prefill_chunk": 64, "kv_dtype": kv_dtype}
    model = ModelConfig(path=str(SHIPPED), device="cpu", dtype="float32")
    driver = EngineDriver.configured(model, EngineConfig.model_validate(settings))
    sampling = msgspec.structs.replace(greedy(1), prompt_logprobs=VOCABULARY)
    keys = []
    for document in read_corpus().held_out:
        keys.append(driver.submit(tokenizer.encode(document.text).ids[:DOCUMENT_TOKENS], sampling))
        driver.finish()
    driver.close()
    rows = [row for key in keys for row in driver.sink.prompt_logprobs[key]]
    found = torch.full((len(rows), VOCABULARY), float("-inf"), dtype=torch.float64)
    for line, row in zip(found, rows, strict=True):
        line[torch.tensor(row.token_ids)] = torch.tensor(row.logprobs, dtype=torch.float64)
    assert found.isfinite().all(), "every token of the vocabulary"
    return found


def drift(exact: torch.Tensor, narrow: torch.Tensor) -> Drift:
    """Of log-probabilities of equal shape [positions, vocabulary]."""
    divergence = (exact.exp() * (exact - narrow)).sum(-1)
    same = (exact.argmax(-1) == narrow.argmax(-1)).double().mean()
    return Drift(float(divergence.mean()), float(divergence.quantile(0.99)), float(same), len(exact))


def narrow_pools(threads: int) -> list[Measurement]:
    exact, rows = distributions(EXACT_KV, threads), list[Measurement]()
    for kv_dtype in NARROW_KV:
        found, name = drift(exact, distributions(kv_dtype, threads)), f"KV pool in {kv_dtype}"
        rows += [
            measure(f"{name}: KL from a float32 pool, mean", "nats", [found.mean_kl]),
            measure(f"{name}: KL from a float32 pool, 99th percentile", "nats", [found.kl_p99]),
            measure(f"{name}: same likeliest token", "%", [100 * found.same_likeliest], "higher"),
        ]
    return [*rows, measure("positions of held-out text", "", [len(exact)], "higher")]


def blended_chunks(threads: int) -> list[Measurement]:
    flags = ["--set", "controller.kv_blend=verified", "--set", f"engine.threads={threads}", "--both", "1"]
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        state_dir = Path(folder) / "state"
        with live_cluster(state_dir, ["--prefill", "0", "--decode", "0", *flags]):
            command = (PDSERVE, "verify", "--blend", "-o", "json", "--state-dir", str(state_dir))
            done = subprocess.run(command, capture_output=True, timeout=VERIFY_S, check=False)
    if done.returncode not in VERIFY_DONE:
        raise RuntimeError(f"pdserve verify --blend: {done.returncode}\n{done.stderr.decode()[-2000:]}")
    check = msgspec.json.decode(done.stdout, type=_Check)
    rows = [measure("prompts of pdserve verify --blend", "", [check.blended_prompts], "higher")]
    for name, figures in ((f"chunks blended, ratio {check.ratio:g}", check), ("naive reuse", check.naive_reuse)):
        rows += [
            measure(f"{name}: KL from the whole prefill, mean", "nats", [figures.mean_kl_nats]),
            measure(f"{name}: KL from the whole prefill, largest", "nats", [figures.max_kl_nats]),
            measure(f"{name}: same likeliest token", "%", [100 * figures.top1_agreement], "higher"),
        ]
    return rows


def run(mode: Mode, threads: int) -> Result:
    settings: dict[str, str | int | float | bool] = {
        "model": "models/pdserve-tiny, float32",
        "document_tokens": DOCUMENT_TOKENS,
        "threads": threads,
    }
    notes = (
        "not a bound: another model, or longer text, drifts by its own amount",
        "the KL of blended chunks is taken over the 20 likeliest tokens, the rest as one: a lower estimate",
    )
    return result("approximations", mode, settings, narrow_pools(threads) + blended_chunks(threads), notes=notes)


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("KL divergence of narrower KV pools and of blended chunks, on the shipped model.")
    add_threads(parser)
    given = parser.parse_args(arguments)
    publish(run(mode_of(given), given.threads))


if __name__ == "__main__":
    main()
