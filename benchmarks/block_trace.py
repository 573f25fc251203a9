"""Owns traces of requests by the blocks of their prompts (the form of Mooncake's trace release), and the best that a cache can do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path

import msgspec

BLOCK_TOKENS = 512
SUFFIX = "_trace.jsonl"


class Request(msgspec.Struct, frozen=True):
    """hash_ids: one number per block of the prompt, equal for equal prefixes. timestamp: milliseconds."""

    timestamp: int
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    name: str
    requests: tuple[Request, ...]

    @property
    def blocks(self) -> int:
        """Of all prompts together."""
        return sum(len(request.hash_ids) for request in self.requests)


def read_traces(folder: Path) -> list[Trace]:
    """All `*_trace.jsonl` of a folder. Raises FileNotFoundError where there is none."""
    decoder = msgspec.json.Decoder(Request)
    traces = [
        Trace(path.name.removesuffix(SUFFIX), tuple(map(decoder.decode, path.read_bytes().splitlines())))
        for path in sorted(folder.glob(f"*{SUFFIX}"))
    ]
    if not traces:
        raise FileNotFoundError(f"There is no file *{SUFFIX} in {folder}.")
    return traces


def unbounded_hits(trace: Trace) -> int:
    """Blocks that were seen before."""
    return trace.blocks - len({block for request in trace.requests for block in request.hash_ids})


def belady_hits(trace: Trace, capacity: int) -> int:
    """Hits of a cache of so many blocks that knows the future and evicts what is used last (Belady 1966): no policy
    that stores every block it misses has more."""
    accesses = [block for request in trace.requests for block in request.hash_ids]
    next_uses = _next_uses(accesses)
    due: dict[int, float] = {}  # of what is in the cache
    latest: list[tuple[float, int]] = []  # max-heap by next use; items that are not `due` any more are stale
    hits = 0
    for block, next_use in zip(accesses, next_uses, strict=True):
        if block in due:
            hits += 1
        elif len(due) == capacity:
            _evict(due, latest)
        due[block] = next_use
        heappush(latest, (-next_use, block))
    return hits


def _next_uses(accesses: Sequence[int]) -> list[float]:
    """For each access the position of the next one of the same block; infinity for the last."""
    uses: list[float] = [math.inf] * len(accesses)
    later: dict[int, int] = {}
    for position in range(len(accesses) - 1, -1, -1):
        uses[position] = later.get(accesses[position], math.inf)
        later[accesses[position]] = position
    return uses


def _evict(due: dict[int, float], latest: list[tuple[float, int]]) -> None:
    while True:
        next_use, block = heappop(latest)
        if due.get(block) == -next_use:
            del due[block]
            return
