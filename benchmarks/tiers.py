"""Time to the first token with a prompt's KV on the device, in host memory, on disk and after a restart, against computing it.

`python -m benchmarks.tiers [--full]`. A real cluster (1 prefill + 1 decode worker) of a random 100M-parameter Llama; prompts of
distinct random tokens, asked one at a time for one token. The device holds fewer prompts than the host tier, that one fewer than the
disk. Where a prompt came from follows from the order of asking; that it was not computed is what its answer says. Then the warm
restart (`warm_restart.py`): hit rates before and after SIGKILL of everything, and how long until a cluster answers again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from benchmarks.command import add_threads, benchmark_parser, mode_of, publish
from benchmarks.live_cluster import LiveCluster, live_cluster
from benchmarks.random_model import DESCRIPTION, LLAMA_100M, write_served_llama
from benchmarks.redis_process import has_redis
from benchmarks.report import Measurement, Mode, Result, compare, measure, result
from benchmarks.served_prompts import (
    PAGE_TOKENS,
    Asked,
    Prompt,
    ask,
    cluster_flags,
    disk_use,
    found_percent,
    random_prompt,
)
from benchmarks.warm_restart import page_bytes, warm_restart

ON_DEVICE, IN_HOST = 2, 5  # prompts that the device and the host tier hold, a little more than that
PROMPTS: dict[Mode, int] = {"quick": 8, "full": 12}
TOKENS: dict[Mode, Sequence[int]] = {"quick": (1024,), "full": (1024, 4096)}
SETTLE_S = 60.0


@dataclass(slots=True)
class Times:
    """Seconds by where the KV came from."""

    computed: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    disk: list[float] = field(default_factory=list)
    restarted: list[float] = field(default_factory=list)
    found_percent: float = 0.0  # of the tokens of all prompts, after the restart


def prompts_of(count: int, tokens: int) -> list[Prompt]:
    rng = Random(tokens)
    return [random_prompt(rng, tokens, LLAMA_100M.vocab) for _ in range(count)]


def flags_of(model: Path, tokens: int, count: int, threads: int) -> list[str]:
    prompt_bytes = (tokens // PAGE_TOKENS + 2) * page_bytes(LLAMA_100M)
    settings: dict[str, str | int] = {
        "engine.kv_bytes": round((ON_DEVICE + 0.5) * prompt_bytes),
        "engine.threads": threads,
        "store.host_bytes": round((IN_HOST + 0.5) * prompt_bytes),
        "store.disk_bytes": 2 * count * prompt_bytes + 2**28,
    }
    return cluster_flags(model, ("--prefill", "1", "--decode", "1"), settings)


def measure_tokens(model: Path, tokens: int, count: int, threads: int) -> Times:
    times, prompts = Times(), prompts_of(count, tokens)
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        state, flags = Path(folder) / "state", flags_of(model, tokens, count, threads)
        with live_cluster(state, flags) as cluster:
            for prompt in prompts:
                times.computed.append(ask(cluster, prompt).seconds)
            settle(cluster, count * (tokens // PAGE_TOKENS))
            times.device = reused([ask(cluster, prompts[-1]) for _ in range(3)], tokens)
            times.host = reused([ask(cluster, prompt) for prompt in prompts[-ON_DEVICE - 2 : -ON_DEVICE]], tokens)
            times.disk = reused([ask(cluster, prompt) for prompt in prompts[: count - IN_HOST - 1]], tokens)
            settle(cluster, count * (tokens // PAGE_TOKENS))
            cluster.kill_everything()
        with live_cluster(state, flags) as cluster:
            after = [ask(cluster, prompt) for prompt in prompts]
            times.restarted = reused(after, tokens)
            times.found_percent = found_percent(after)
    return times


def reused(asked: Sequence[Asked], tokens: int) -> list[float]:
    """Their times. Raises where a prompt was computed after all: its time would be told as another one's."""
    for each in asked:
        if each.cached_tokens < tokens - PAGE_TOKENS:
            raise RuntimeError(f"Only {each.cached_tokens} of {tokens} tokens were found; the prompt was computed.")
    return [each.seconds for each in asked]


def settle(cluster: LiveCluster, pages: int) -> None:
    """Until the disk of the prefill worker holds so many pages."""
    deadline_s = time.monotonic() + SETTLE_S
    while (held := disk_use(cluster)[0]) < pages:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{held} of {pages} pages went to disk within {SETTLE_S:.0f} s.")
        time.sleep(0.05)


def measurements(tokens: int, times: Times) -> list[Measurement]:
    computed = ("computed in the same cluster", times.computed[1:])
    sources = {"device": times.device, "host": times.host, "disk": times.disk, "disk after SIGKILL": times.restarted}
    rows = [measure(f"TTFT of {tokens} tokens, computed", "s", times.computed[1:])]
    rows += [
        compare(f"TTFT of {tokens} tokens, {name}", "s", seconds, computed, "lower")
        for name, seconds in sources.items()
    ]
    return [
        *rows,
        measure(
            f"tokens of prompts of {tokens} found after SIGKILL of everything",
            "% of tokens",
            [times.found_percent],
            "higher",
        ),
    ]


def run(mode: Mode, threads: int) -> Result:
    rows: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="pdserve-model-") as folder:
        model = write_served_llama(Path(folder) / "model")
        for tokens in TOKENS[mode]:
            rows += measurements(tokens, measure_tokens(model, tokens, PROMPTS[mode], threads))
    rows += warm_restart(mode, threads)
    settings: dict[str, str | int | float | bool] = {
        "model": DESCRIPTION,
        "threads": threads,
        "prompts": PROMPTS[mode],
        "redis": has_redis(),
    }
    notes = (
        "hit rates: a random Llama of 4 layers; documents by Zipf's law, each request with a question of its own; of the bytes of all"
        " distinct pages the device of a worker holds 0.15, its host tier 0.3, Redis 0.3 (empty after its SIGKILL), the disk all",
        "pdserve up: one worker, 1 MiB of KV per page; the start of Python, torch and the weights is in it",
    )
    return result("tiers", mode, settings, rows, notes=notes)


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Time to the first token of long prompts, loaded from the tiers or computed.")
    add_threads(parser)
    given = parser.parse_args(arguments)
    publish(run(mode_of(given), given.threads))


if __name__ == "__main__":
    main()
