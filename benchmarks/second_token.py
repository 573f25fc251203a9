"""Time from a prompt's first token to its second where a hand-off lies between them, against the same on one worker.

`python -m benchmarks.second_token [--full]`. A real cluster (1 prefill + 1 decode worker) of a random 100M-parameter Llama. Prompts of
fresh random tokens are asked through the SDK, one at a time, split over both workers by each transport and whole on the decode
worker, in turns. The second token behind a hand-off waits for what of the KV was not sent during the prefill.
"""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from pathlib import Path

from benchmarks.command import add_threads, benchmark_parser, mode_of, publish
from benchmarks.live_cluster import live_cluster
from benchmarks.random_model import DESCRIPTION, LLAMA_100M, write_served_llama
from benchmarks.report import Measurement, Mode, Result, compare, measure, result
from pdserve.client import Client, RequestOptions, Route, Sampling

PROMPTS: dict[Mode, int] = {"quick": 5, "full": 15}
TOKENS: dict[Mode, tuple[int, ...]] = {"quick": (1024,), "full": (1024, 4096)}
ROUTES = {"one worker": Route("", "d0"), "ucx": Route("p0", "d0", "ucx"), "tcp": Route("p0", "d0", "tcp")}
OUTPUT = 8
Times = dict[str, list[float]]


def gaps_s(client: Client, prompt: list[int], route: Route) -> list[float]:
    """Seconds between a prompt's tokens; the first is that from the first token to the second."""
    stream = client.generate(prompt, Sampling(OUTPUT, 0.0, ignore_eos=True), options=RequestOptions(route=route))
    arrived_s = [time.monotonic() for item in stream for _ in getattr(item, "token_ids", ())]
    if len(arrived_s) != OUTPUT:
        raise RuntimeError(f"{len(arrived_s)} tokens came instead of {OUTPUT}.")
    return [later - earlier for earlier, later in itertools.pairwise(arrived_s)]


def measure_tokens(client: Client, tokens: int, prompts: int) -> tuple[Times, Times]:
    """By route: the gaps before the second token, and those after it."""
    rng = random.Random(tokens)
    second: Times = {name: [] for name in ROUTES}
    later: Times = {name: [] for name in ROUTES}
    for number in range(prompts + 1):
        for name, route in ROUTES.items():
            gaps = gaps_s(client, [rng.randrange(10, LLAMA_100M.vocab) for _ in range(tokens)], route)
            if number:  # the first of each route opens connections
                second[name].append(1e3 * gaps[0])
                later[name] += [1e3 * gap for gap in gaps[1:]]
    return second, later


def measurements(tokens: int, second: Times, later: Times) -> list[Measurement]:
    alone = ("one worker", second["one worker"])
    rows = [measure(f"{tokens} tokens: to the second token, one worker", "ms", alone[1])]
    for name in ("ucx", "tcp"):
        rows.append(
            compare(f"{tokens} tokens: to the second token, handed off by {name}", "ms", second[name], alone, "lower")
        )
        rows.append(measure(f"{tokens} tokens: to later tokens, handed off by {name}", "ms", later[name]))
    return rows


def run(mode: Mode, threads: int) -> Result:
    rows: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        model = write_served_llama(Path(folder) / "model")
        sets = (f"engine.threads={threads}", "engine.prefix_reuse=false", "store.host_bytes=0")
        flags = ["--model", str(model), "--prefill", "1", "--decode", "1"]
        flags += [word for pair in sets for word in ("--set", pair)]
        with (
            live_cluster(Path(folder) / "state", flags) as cluster,
            Client(str(cluster.get("/api/v1/status")["grpc_address"])) as client,
        ):
            for tokens in TOKENS[mode]:
                rows += measurements(tokens, *measure_tokens(client, tokens, PROMPTS[mode]))
    settings: dict[str, str | int | float | bool] = {"model": DESCRIPTION, "threads": threads, "prompts": PROMPTS[mode]}
    return result("second_token", mode, settings, rows)


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Time to the second token of prompts that are handed off, against one worker.")
    add_threads(parser)
    given = parser.parse_args(arguments)
    publish(run(mode_of(given), given.threads))


if __name__ == "__main__":
    main()
