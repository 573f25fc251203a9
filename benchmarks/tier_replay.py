"""A slice of a request trace, served by real workers: where its prompts' KV was found, and what that does to the first token.

`python -m benchmarks.tier_replay --traces DIR [--full]`, or PDSERVE_TRACES=DIR as for `benchmarks.cache_replay`. For each capacity
there is a cluster of one worker per eviction policy, with device, host and disk, and one that computes everything. Every prompt goes
to all of them, one after the other and in turning order, for one token: what else the machine does meets all alike.

How the trace is scaled: its prompts form trees by their first block, and trees are drawn at random, whole, so that what is left
repeats itself as the whole does. A block of 512 tokens becomes one of 16, a page, and prompts shrink alike. Capacities are shares of
the slice's distinct pages. Arrival times are left out.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.block_trace import BLOCK_TOKENS, Request, Trace, read_traces, unbounded_hits
from benchmarks.cache_replay import TRACES_VARIABLE
from benchmarks.command import add_threads, benchmark_parser, mode_of, publish
from benchmarks.live_cluster import LiveCluster, live_cluster
from benchmarks.random_model import LlamaShape, write_served_llama
from benchmarks.report import Measurement, Mode, Result, compare, measure, result
from benchmarks.served_prompts import Asked, ask
from kv_store.policies import POLICIES

PAGE_TOKENS = 16
SHAPE = LlamaShape(layers=4, hidden=512, heads=8, kv_heads=4, intermediate=1376)
DESCRIPTION = "random Llama, 4 layers, hidden 512, 8/4 heads of 64, ffn 1376, vocabulary 32,000, tied, float32"
SHARES: dict[Mode, float] = {"quick": 0.005, "full": 0.03}  # of the trees
SEED = 0
SPARE_PAGES = 8  # of the device, beyond the longest prompt
SETTLE_S, STEADY_S, LOOK_S = 30.0, 1.5, 0.25
COMPUTED = "computed"
TIERS = ("host", "disk")


@dataclass(frozen=True, slots=True)
class Capacity:
    """Shares of the distinct pages of the slice."""

    name: str
    host: float
    disk: float


SMALL = Capacity("small", 0.1, 0.25)
LARGE = Capacity("large", 0.25, 0.6)
CAPACITIES: dict[Mode, Sequence[Capacity]] = {"quick": (LARGE,), "full": (SMALL, LARGE)}


@dataclass(slots=True)
class Lane:
    """What one worker did with all prompts. loaded: tokens that came to the device, by tier. dropped: pages not stored."""

    asked: list[Asked] = field(default_factory=list)
    loaded: dict[str, int] = field(default_factory=dict)
    dropped: int = 0

    @property
    def seconds(self) -> list[float]:
        return [each.seconds for each in self.asked]

    @property
    def cached_tokens(self) -> int:
        return sum(each.cached_tokens for each in self.asked)

    @property
    def device_tokens(self) -> int:
        """Hits that nothing was loaded for."""
        return self.cached_tokens - sum(self.loaded.values())


def slice_of(trace: Trace, share: float) -> Trace:
    """The requests of so many of its trees, in their order."""
    rng = random.Random(SEED)
    roots = dict.fromkeys(request.hash_ids[0] for request in trace.requests)
    chosen = {root for root in roots if rng.random() < share}
    return Trace(trace.name, tuple(request for request in trace.requests if request.hash_ids[0] in chosen))


def prompt_of(request: Request) -> list[int]:
    """Tokens of its blocks, 16 each; the last block is cut as in the trace."""
    tokens = [token for block in request.hash_ids for token in block_tokens(block)]
    return tokens[: max(1, request.input_length * PAGE_TOKENS // BLOCK_TOKENS)]


def block_tokens(block: int) -> list[int]:
    rng = random.Random(block)
    return [rng.randrange(10, SHAPE.vocab) for _ in range(PAGE_TOKENS)]


@dataclass(frozen=True, slots=True)
class Replay:
    """The slice and the worker it is sent to."""

    trace: Trace
    model: Path
    threads: int

    @property
    def prompts(self) -> Iterator[list[int]]:
        return map(prompt_of, self.trace.requests)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def distinct_pages(self) -> int:
        return len({block for request in self.trace.requests for block in request.hash_ids})

    @property
    def device_pages(self) -> int:
        return max(len(request.hash_ids) for request in self.trace.requests) + SPARE_PAGES

    def settings(self, policy: str, capacity: Capacity) -> dict[str, str | int]:
        page_bytes = SHAPE.kv_elements_per_token * PAGE_TOKENS * 4
        base: dict[str, str | int] = {
            "engine.kv_bytes": self.device_pages * page_bytes,
            "engine.threads": self.threads,
            "engine.cores": "none",  # the others would be bound to what the first one leaves
            "controller.no_worker_grace_s": 60,  # a starved worker misses heartbeats: that is waited for, and counted
            "model.served_name": "m",
            "model.dtype": "float32",
        }
        if policy == COMPUTED:
            return {**base, "store.host_bytes": 0, "engine.prefix_reuse": "false"}
        return {
            **base,
            "store.eviction": policy,
            "store.host_bytes": round(capacity.host * self.distinct_pages) * page_bytes,
            "store.disk_bytes": round(capacity.disk * self.distinct_pages) * page_bytes,
        }

    def run(self, capacity: Capacity) -> dict[str, Lane]:
        """By policy, and COMPUTED."""
        lanes = {name: Lane() for name in (COMPUTED, *POLICIES)}
        with ExitStack() as stack:
            clusters = {name: stack.enter_context(self._cluster(name, capacity)) for name in lanes}
            for turn, prompt in enumerate(self.prompts):
                for name in turned(list(lanes), turn):
                    lanes[name].asked.append(ask(clusters[name], prompt))
            for name in POLICIES:
                lanes[name].loaded, lanes[name].dropped = settled_figures(clusters[name])
        return lanes

    @contextmanager
    def _cluster(self, policy: str, capacity: Capacity) -> Iterator[LiveCluster]:
        settings = self.settings(policy, capacity)
        pairs = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
            flags = ["--model", str(self.model), "--both", "1", *pairs]
            with live_cluster(Path(folder) / "state", flags) as cluster:
                yield cluster


def turned(names: list[str], turn: int) -> list[str]:
    first = turn % len(names)
    return names[first:] + names[:first]


def settled_figures(cluster: LiveCluster) -> tuple[dict[str, int], int]:
    """Tokens loaded by tier and pages dropped, once reports of the worker bring nothing new."""
    deadline_s = time.monotonic() + SETTLE_S
    seen, since_s = figures(cluster), time.monotonic()
    while time.monotonic() - since_s < STEADY_S and time.monotonic() < deadline_s:
        time.sleep(LOOK_S)
        now = figures(cluster)
        if now != seen:
            seen, since_s = now, time.monotonic()
    return seen


def figures(cluster: LiveCluster) -> tuple[dict[str, int], int]:
    workers = cluster.get("/api/v1/kv")["workers"]
    assert isinstance(workers, list)
    (worker,) = workers
    loads = worker["loads"]
    dropped = sum(tier["dropped"] for tier in worker["tiers"])
    return dict(loads["loaded_tokens"]), int(dropped + loads["dropped_on_the_way_down"])


def rows(name: str, lane: Lane, computed: Lane, prompt_tokens: int) -> list[Measurement]:
    mean, all_computed = statistics.fmean(lane.seconds), statistics.fmean(computed.seconds)
    hits = {"device": lane.device_tokens, **{tier: lane.loaded.get(tier, 0) for tier in TIERS}}
    return [
        *(measure(f"{name}: tokens hit, {tier}", "tokens", [count], "higher") for tier, count in hits.items()),
        measure(f"{name}: tokens computed", "tokens", [prompt_tokens - lane.cached_tokens]),
        measure(f"{name}: pages dropped, not stored", "pages", [lane.dropped]),
        compare(f"{name}: TTFT, median", "s", lane.seconds, (COMPUTED, computed.seconds), "lower"),
        compare(f"{name}: TTFT, mean", "s", [mean], (COMPUTED, [all_computed]), "lower"),
    ]


def measurements(replay: Replay, capacities: Sequence[Capacity]) -> Iterator[Measurement]:
    tokens = replay.prompt_tokens
    yield measure("tokens of all prompts", "tokens", [tokens])
    yield measure("tokens seen before, without limit", "tokens", [seen_tokens(replay.trace)], "higher")
    for capacity in capacities:
        lanes = replay.run(capacity)
        computed = lanes.pop(COMPUTED)
        for policy, lane in lanes.items():
            yield from rows(f"{capacity.name}, {policy}", lane, computed, tokens)


def seen_tokens(trace: Trace) -> int:
    return unbounded_hits(trace) * PAGE_TOKENS


def settings_of(replay: Replay, capacities: Sequence[Capacity]) -> Mapping[str, str | int | float | bool]:
    pages = replay.distinct_pages
    sizes = {
        f"{capacity.name}_{tier}_pages": round(share * pages)
        for capacity in capacities
        for tier, share in (("host", capacity.host), ("disk", capacity.disk))
    }
    return {
        "model": DESCRIPTION,
        "threads": replay.threads,
        "trace": replay.trace.name,
        "requests": len(replay.trace.requests),
        "page_tokens": PAGE_TOKENS,
        "distinct_pages": pages,
        "device_pages": replay.device_pages,
        **sizes,
    }


def run(mode: Mode, folder: Path, threads: int) -> Result:
    trace = slice_of(read_traces(folder)[0], SHARES[mode])
    capacities = CAPACITIES[mode]
    with tempfile.TemporaryDirectory(prefix="pdserve-model-") as place:
        model = write_served_llama(Path(place) / "model", SHAPE)
        replay = Replay(trace, model, threads)
        found = list(measurements(replay, capacities))
        settings = dict(settings_of(replay, capacities))
    notes = (
        f"trees of the trace drawn with a chance of {SHARES[mode]}, blocks of 512 tokens scaled to {PAGE_TOKENS}",
        "hits of a tier: tokens loaded from it; of the device: the other cached ones",
        "the disk tier keeps a segment in sixteen, and one more, free: it holds fewer pages than its size says",
    )
    return result("tier_replay", mode, settings, found, notes=notes)


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("A request trace through a worker's tiers.")
    parser.add_argument("--traces", type=Path, default=os.environ.get(TRACES_VARIABLE), help="folder of *_trace.jsonl")
    add_threads(parser)
    given = parser.parse_args(arguments)
    if given.traces is None:
        parser.error(f"no traces: give --traces DIR or set {TRACES_VARIABLE}")
    publish(run(mode_of(given), Path(given.traces), given.threads))


if __name__ == "__main__":
    main()
