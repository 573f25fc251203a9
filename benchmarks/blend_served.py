"""Time to the first token of prompts made of known chunks, through the whole stack: blended with the chunks' KV from the device, from
host memory or from disk after a restart, against the whole prefill of the same prompts in the same cluster.

`python -m benchmarks.blend_served [--full]`. A real cluster (1 prefill + 1 decode worker) of a random 100M-parameter Llama: time, not
quality (`benchmarks.blend_accuracy` has that). Every prompt has its chunks in an order of its own and another question, so that no
prefix of it was ever computed. Loading is part of the time: it begins with the blend, which waits
for it after the first layer.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command import add_threads, benchmark_parser, mode_of, publish
from benchmarks.live_cluster import LiveCluster, live_cluster
from benchmarks.random_model import DESCRIPTION, LLAMA_100M, write_served_llama
from benchmarks.report import Measurement, Mode, Result, compare, result
from benchmarks.served_prompts import PAGE_TOKENS
from benchmarks.tiers import settle

CHUNK_TOKENS, QUESTION_TOKENS = 256, 32
RATIO = 0.15
TOKENS: dict[Mode, Sequence[int]] = {"quick": (2048,), "full": (2048, 4096, 8192)}
ROUNDS: dict[Mode, int] = {"quick": 3, "full": 3}


@dataclass(slots=True)
class Corpus:
    """Chunks of random tokens, and prompts of all of them."""

    chunks: list[list[int]]
    rng: random.Random

    @classmethod
    def of(cls, tokens: int) -> Corpus:
        rng = random.Random(tokens)
        return cls([_random_tokens(rng, CHUNK_TOKENS) for _ in range(tokens // CHUNK_TOKENS)], rng)

    def prompt(self) -> tuple[list[int], list[list[int]]]:
        """Token ids and [start, end) of each chunk. Begins with a fresh token: no two prompts share a prefix."""
        prompt, spans = _random_tokens(self.rng, 1), list[list[int]]()
        for chunk in self.rng.sample(self.chunks, len(self.chunks)):
            spans.append([len(prompt), len(prompt) + len(chunk)])
            prompt += chunk
        return prompt + _random_tokens(self.rng, QUESTION_TOKENS), spans


def _random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(10, LLAMA_100M.vocab) for _ in range(count)]


def ask(cluster: LiveCluster, corpus: Corpus, *, blended: bool) -> float:
    """Seconds to the only token. Raises where the answer says that nothing was blended though it should."""
    prompt, spans = corpus.prompt()
    body: dict[str, object] = {"model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    if blended:
        body["kv_blend"] = {"method": "blend", "ratio": RATIO, "chunks": spans}
    started_s = time.monotonic()
    usage = cluster.post("/v1/completions", body)["usage"]
    seconds = time.monotonic() - started_s
    assert isinstance(usage, dict)
    found = int(usage["prompt_tokens_details"].get("blended_tokens", 0))
    if found != (len(corpus.chunks) * CHUNK_TOKENS if blended else 0):
        raise RuntimeError(f"{found} tokens were blended of a prompt of {len(prompt)}.")
    return seconds


def flags_of(model: Path, tokens: int, threads: int) -> list[str]:
    page_bytes = LLAMA_100M.kv_elements_per_token * PAGE_TOKENS * 4
    prompt_bytes = (tokens // PAGE_TOKENS + 40) * page_bytes
    settings = {
        "controller.kv_blend": "on",
        "engine.kv_bytes": round(3.2 * prompt_bytes),
        "engine.threads": threads,
        "model.served_name": "m",
        "store.host_bytes": 8 * prompt_bytes,
        "store.disk_bytes": 8 * prompt_bytes + 2**28,
    }
    pairs = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return ["--model", str(model), "--prefill", "1", "--decode", "1", *pairs]


def measure_tokens(model: Path, tokens: int, rounds: int, threads: int) -> list[Measurement]:
    corpus = Corpus.of(tokens)
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        state, flags = Path(folder) / "state", flags_of(model, tokens, threads)
        with live_cluster(state, flags) as cluster:
            first = ask(cluster, corpus, blended=True)  # computes every chunk alone
            settle(cluster, tokens // PAGE_TOKENS)
            device = [ask(cluster, corpus, blended=True) for _ in range(rounds)]
            whole = [ask(cluster, corpus, blended=False) for _ in range(rounds)]
            for _ in range(2):  # the device forgets the chunks
                ask(cluster, corpus, blended=False)
            host = [ask(cluster, corpus, blended=True)]
        disk: list[float] = []
        for _ in range(rounds):
            with live_cluster(state, flags) as cluster:
                ask(cluster, Corpus.of(CHUNK_TOKENS), blended=False)  # the first request of a process is slower
                disk.append(ask(cluster, corpus, blended=True))
    against = ("whole prefill in the same cluster", whole)
    sources = {"device": device, "host": host, "disk, after a restart": disk, "nowhere: computed alone first": [first]}
    return [
        compare(f"TTFT of {tokens} tokens in chunks, KV from {name}", "s", seconds, against, "lower")
        for name, seconds in sources.items()
    ]


def run(mode: Mode, threads: int) -> Result:
    rows: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="pdserve-model-") as folder:
        model = write_served_llama(Path(folder) / "model")
        for tokens in TOKENS[mode]:
            rows += measure_tokens(model, tokens, ROUNDS[mode], threads)
    settings: dict[str, str | int | float | bool] = {
        "model": DESCRIPTION,
        "threads": threads,
        "chunk_tokens": CHUNK_TOKENS,
        "question_tokens": QUESTION_TOKENS,
        "ratio": RATIO,
    }
    return result("blend_served", mode, settings, rows)


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Time to the first token of blended prompts through the whole stack.")
    add_threads(parser)
    given = parser.parse_args(arguments)
    publish(run(mode_of(given), given.threads))


if __name__ == "__main__":
    main()
