"""Eviction policies on real request traces: block hit rates and compute saved, through the tier index that workers use.

`python -m benchmarks.cache_replay --traces DIR [--full]`, or PDSERVE_TRACES=DIR. DIR holds `*_trace.jsonl` of Mooncake's trace
release. No KV is moved: this counts what is found, in pages of 512 tokens; a request hits the longest prefix that is there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.block_trace import BLOCK_TOKENS, Request, Trace, belady_hits, read_traces, unbounded_hits
from benchmarks.command import benchmark_parser, mode_of, publish
from benchmarks.report import (
    RESULTS,
    Measurement,
    Mode,
    Result,
    compare,
    measure,
    read_result,
    result,
)
from kv_store.eviction import EvictionPolicy
from kv_store.page import Page, PageId
from kv_store.policies import POLICIES, policy_of
from kv_store.tier_index import TierIndex

TRACES_VARIABLE = "PDSERVE_TRACES"
CAPACITIES: dict[Mode, tuple[int, ...]] = {"quick": (1_000, 10_000), "full": (1_000, 5_000, 10_000, 30_000)}
RAM_BLOCKS, DISK_BLOCKS = 3_000, 30_000
PREFILL_RESULT = RESULTS / "peers_float32-full.json"
_PREFILL = re.compile(r"float32: prefill, (\d+) tokens / .*")
_FOREVER_S = 1e18


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """Seconds to prefill n tokens: linear_s * n + quadratic_s * n^2."""

    linear_s: float
    quadratic_s: float

    @classmethod
    def fitted(cls, seconds: dict[int, float]) -> PrefillCost:
        """Least squares of the relative error. seconds: by number of tokens."""
        rows = np.array([[1.0 / taken * tokens, 1.0 / taken * tokens**2] for tokens, taken in seconds.items()])
        linear_s, quadratic_s = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]
        return cls(float(linear_s), float(quadratic_s))

    @classmethod
    def measured(cls, shown: Result) -> PrefillCost:
        """From the prefill rates of a result of `benchmarks.peers`."""
        found = [(_PREFILL.fullmatch(item.name), item.figure.median) for item in shown.measurements]
        return cls.fitted({int(match[1]): int(match[1]) / rate for match, rate in found if match is not None})

    def of(self, tokens: int) -> float:
        return self.linear_s * tokens + self.quadratic_s * tokens**2

    def of_block(self, ordinal: int) -> float:
        """Of block `ordinal` of a prompt when all before it are there."""
        return self.of((ordinal + 1) * BLOCK_TOKENS) - self.of(ordinal * BLOCK_TOKENS)


class Tier:
    """A tier index whose pages are one byte: capacities are numbers of blocks."""

    def __init__(self, blocks: int, policy: EvictionPolicy) -> None:
        self._index = TierIndex(blocks, policy, _FOREVER_S)

    def hits(self, pages: Sequence[Page]) -> int:
        """Length of the longest prefix of `pages` that is there; counts as used."""
        entries = self._index.pin([page.id for page in pages], 0.0)
        self._index.unpin(entries)
        return len(entries)

    def store(self, pages: Sequence[Page]) -> None:
        """What does not fit is left out."""
        for page in pages:
            granted, _ = self._index.make_room(page, 1, 0.0)
            if granted:
                self._index.commit(self._index.begin(page, 1, 0, 0.0))


@dataclass(slots=True)
class Found:
    blocks: int = 0
    saved_s: float = 0.0
    ram_blocks: int = 0

    def count(self, request: Request, hits: int, cost: PrefillCost) -> None:
        self.blocks += hits
        self.saved_s += cost.of(min(hits * BLOCK_TOKENS, request.input_length))


Saving = Callable[[int], float]  # seconds that a hit of the block of this ordinal saves


def alike(ordinal: int) -> float:
    """Of blocks whose place does not matter: as cheap to read from the next tier as any other."""
    return 1.0


def pages_of(request: Request, saving: Saving) -> list[Page]:
    keys = [block.to_bytes(32, "little") for block in request.hash_ids]
    parents = [b"", *keys[:-1]]
    return [
        Page(PageId(key, 0, b""), parent, saving_s=saving(ordinal))
        for ordinal, (key, parent) in enumerate(zip(keys, parents, strict=True))
    ]


def replay(trace: Trace, tier: Tier, saving: Saving, cost: PrefillCost) -> Found:
    found = Found()
    for request in trace.requests:
        pages = pages_of(request, saving)
        hits = tier.hits(pages)
        found.count(request, hits, cost)
        tier.store(pages[hits:])
    return found


def replay_two_tiers(
    trace: Trace,
    down: Callable[[Sequence[Page]], Sequence[Page]],
    cost: PrefillCost,
    policy: str = "lru",
    disk_saving: Saving = alike,
) -> Found:
    """RAM above disk. What is read from disk is copied to RAM. down: of the pages of a request, those that go to disk.

    In RAM all blocks count alike: the disk gives any of them sooner than computing does (kv_store.benefit).
    """
    found = Found()
    ram, disk = Tier(RAM_BLOCKS, policy_of(policy)()), Tier(DISK_BLOCKS, policy_of(policy)())
    for request in trace.requests:
        pages = pages_of(request, alike)
        hits = 0
        while True:
            in_ram = ram.hits(pages[hits:])
            on_disk = disk.hits(pages[hits + in_ram :])
            found.ram_blocks += in_ram
            ram.store(pages[hits + in_ram : hits + in_ram + on_disk])
            hits += in_ram + on_disk
            if not on_disk:
                break
        found.count(request, hits, cost)
        ram.store(pages[hits:])
        disk.store(down(pages_of(request, disk_saving)))
    return found


def write_through(pages: Sequence[Page]) -> Sequence[Page]:
    return pages


class SecondUse:
    """Pages that were used before, however long ago."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def __call__(self, pages: Sequence[Page]) -> Sequence[Page]:
        again = [page for page in pages if page.id.key in self._seen]
        self._seen.update(page.id.key for page in pages)
        return again


def measure_trace(trace: Trace, capacities: Sequence[int], cost: PrefillCost) -> list[Measurement]:
    endless = replay(trace, Tier(trace.blocks, policy_of("lru")()), cost.of_block, cost)
    assert endless.blocks == unbounded_hits(trace)
    measured = [
        measure(f"{trace.name}: no limit, hits", "% of blocks", [_percent(endless.blocks, trace)], "higher"),
        measure(f"{trace.name}: no limit, compute saved", "s", [endless.saved_s], "higher"),
    ]
    for capacity in capacities:
        measured += _at_capacity(trace, capacity, cost)
    both = {"write-through": replay_two_tiers(trace, write_through, cost)}
    both["second use only"] = replay_two_tiers(trace, SecondUse(), cost)
    both["write-through, gdsf"] = replay_two_tiers(trace, write_through, cost, "gdsf", cost.of_block)
    both["write-through, gdsf, equal savings"] = replay_two_tiers(trace, write_through, cost, "gdsf")
    for name, found in both.items():
        title = f"{trace.name}: RAM {RAM_BLOCKS} + disk {DISK_BLOCKS} blocks, {name}"
        measured.append(measure(f"{title}, hits", "% of blocks", [_percent(found.blocks, trace)], "higher"))
        measured.append(measure(f"{title}, hits in RAM", "% of blocks", [_percent(found.ram_blocks, trace)], "higher"))
        measured.append(measure(f"{title}, compute saved", "s", [found.saved_s], "higher"))
    return measured


def _at_capacity(trace: Trace, capacity: int, cost: PrefillCost) -> list[Measurement]:
    found = {name: replay(trace, Tier(capacity, make()), cost.of_block, cost) for name, make in POLICIES.items()}
    found["gdsf, equal savings"] = replay(trace, Tier(capacity, policy_of("gdsf")()), alike, cost)
    best = [_percent(belady_hits(trace, capacity), trace)]
    measured: list[Measurement] = []
    for name, each in found.items():
        title, hits, saved = f"{trace.name}: {capacity} blocks, {name}", [_percent(each.blocks, trace)], [each.saved_s]
        measured.append(compare(f"{title}, hits", "% of blocks", hits, ("Belady", best), "higher"))
        measured.append(compare(f"{title}, compute saved", "s", saved, ("lru", [found["lru"].saved_s]), "higher"))
    return measured


def _percent(blocks: int, trace: Trace) -> float:
    return round(100.0 * blocks / trace.blocks, 2)


def run(mode: Mode, folder: Path) -> Result:
    shown = read_result(PREFILL_RESULT)
    cost = PrefillCost.measured(shown)
    traces = read_traces(folder)
    measurements = [item for trace in traces for item in measure_trace(trace, CAPACITIES[mode], cost)]
    settings: dict[str, str | int | float | bool] = {
        "block_tokens": BLOCK_TOKENS,
        "prefill_of": f"{shown.settings['model']}, float32, {shown.settings['threads']} threads",
        "prefill_us_per_token": round(cost.linear_s * 1e6, 2),
        "prefill_ns_per_token_squared": round(cost.quadratic_s * 1e9, 3),
        **{f"requests_of_{trace.name}": len(trace.requests) for trace in traces},
        **{f"blocks_of_{trace.name}": trace.blocks for trace in traces},
    }
    notes = (
        "exact counts of one replay, not samples: another run gives the same; the machine matters to the prefill speed only",
        "compute saved: prefill seconds of the hit prefix; a + b n per token, fitted to our prefill of 512 to 8,192 tokens "
        "and extrapolated for longer prompts. Its peer is LRU at the same capacity",
        "gdsf counts the seconds of each block (later blocks cost more), as workers do in the last tier; 'equal savings' counts every "
        "block as one, as workers do in tiers above another one",
    )
    return result("cache_replay", mode, settings, measurements, notes=notes)


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Eviction policies on request traces.")
    parser.add_argument("--traces", type=Path, default=os.environ.get(TRACES_VARIABLE), help="folder of *_trace.jsonl")
    given = parser.parse_args(arguments)
    if given.traces is None:
        parser.error(f"no traces: give --traces DIR or set {TRACES_VARIABLE}")
    publish(run(mode_of(given), Path(given.traces)))


if __name__ == "__main__":
    main()
