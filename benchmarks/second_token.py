"""Time from a prompt's first token to its second where a hand-off lies between them, against the same on one worker.

`python -m benchmarks.second_token [--full]`. A real cluster (1 prefill + 1 decode worker) of a random 100M-parameter Llama. Prompts of
fresh random tokens are asked through the SDK, one at a time, split over both workers by each transport and whole on the decode
worker, in turns. The second token behind a hand-off waits for what of the KV was not sent during the prefill. The time to the first
stands beside it: whatever delays the first token shortens the gap behind it. --threads says whether cores are left: with 2 on a
machine of 4 controller and io processes run on the engines' cores, with 1 they have their own.
"""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from dataclasses import dataclass
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
Times = dict[str, list[float]]  # ms by route


@dataclass(frozen=True, slots=True)
class Taken:
    first: Times
    second: Times  # since the first
    later: Times  # since the one before


def waits_ms(client: Client, prompt: list[int], route: Route) -> list[float]:
    """How long each token came after the one before, the first after the request."""
    asked_s = time.monotonic()
    stream = client.generate(prompt, Sampling(OUTPUT, 0.0, ignore_eos=True), options=RequestOptions(route=route))
    arrived_s = [time.monotonic() for item in stream for _ in getattr(item, "token_ids", ())]
    if len(arrived_s) != OUTPUT:
        raise RuntimeError(f"{len(arrived_s)} tokens came instead of {OUTPUT}.")
    return [1e3 * (later - earlier) for earlier, later in itertools.pairwise((asked_s, *arrived_s))]


def measure_tokens(client: Client, tokens: int, prompts: int) -> Taken:
    rng = random.Random(tokens)
    taken = Taken(_by_route(), _by_route(), _by_route())
    for number in range(prompts + 1):
        for name, route in ROUTES.items():
            first, second, *later = waits_ms(
                client, [rng.randrange(10, LLAMA_100M.vocab) for _ in range(tokens)], route
            )
            if number:  # the first of each route opens connections
                taken.first[name].append(first)
                taken.second[name].append(second)
                taken.later[name] += later
    return taken


def _by_route() -> Times:
    return {name: [] for name in ROUTES}


def measurements(tokens: int, taken: Taken) -> list[Measurement]:
    one_first, one_second = taken.first["one worker"], taken.second["one worker"]
    rows = [
        measure(f"{tokens} tokens: to the first token, one worker", "ms", one_first),
        measure(f"{tokens} tokens: to the second token, one worker", "ms", one_second),
    ]
    for name in ("ucx", "tcp"):
        handed = f"handed off by {name}"
        first, second = ("one worker", one_first), ("one worker", one_second)
        rows += [
            compare(f"{tokens} tokens: to the first token, {handed}", "ms", taken.first[name], first, "lower"),
            compare(f"{tokens} tokens: to the second token, {handed}", "ms", taken.second[name], second, "lower"),
            measure(f"{tokens} tokens: to later tokens, {handed}", "ms", taken.later[name]),
        ]
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
                rows += measurements(tokens, measure_tokens(client, tokens, PROMPTS[mode]))
    settings: dict[str, str | int | float | bool] = {"model": DESCRIPTION, "threads": threads, "prompts": PROMPTS[mode]}
    return result(f"second_token_{threads}_threads", mode, settings, rows)


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Time to the second token of prompts that are handed off, against one worker.")
    add_threads(parser)
    given = parser.parse_args(arguments)
    publish(run(mode_of(given), given.threads))


if __name__ == "__main__":
    main()
