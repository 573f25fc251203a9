"""Owns what a task of attention costs on one machine: a few coefficients, and how they follow from timed calls. Pure.

They answer one question, whether a task for all members of a run is faster than one for each of them (engine.step_work): what both
have in common is left out, and only ratios matter. `engine.attention_fit` takes the times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_READ_TOGETHER = 8  # panels of one KV head, at most: MOST_PANELS of kernels.cpp
# A coefficient so many times as large or small as the shipped one, as a part of a panel's time, was disturbed.
_IMPLAUSIBLE = 8.0


@dataclass(frozen=True, slots=True)
class AttentionCosts:
    """Seconds on one thread, for one KV head. `lanes` of a vector; `panel`: queries that are multiplied together.

    Up to half as many queries as lanes (few) read keys where they lie: `few` is what a chunk of keys takes for 1, for half and for
    all of so many. More (many) take `copy` per chunk, `vector` for each of their vectors and `query` for each of them.
    Both are of keys in the caches; the first to read them takes `read_few` or `read_many` more.
    `task`: of each task; `partial`: of each query's result that is merged with others.
    More than `cached_chunks` (of all KV heads) do not stay in the caches: of so many everyone is the first to read them.
    """

    lanes: int
    panel: int
    few: tuple[float, float, float]
    copy: float
    vector: float
    query: float
    read_few: float
    read_many: float
    task: float
    partial: float
    cached_chunks: int = 15

    @property
    def most_few(self) -> int:
        return self.lanes // 2  # FEW of kernels.cpp

    def chunk_s(self, queries: int) -> float:
        """Of one chunk for so many queries of a task."""
        return self.copy_s(queries) + self.sums_s(queries)

    def copy_s(self, queries: int) -> float:
        """Of it what panels of queries have in common."""
        return -(-queries // (_READ_TOGETHER * self.panel)) * self.copy if queries > self.most_few else 0.0

    def sums_s(self, queries: int) -> float:
        if queries > self.most_few:
            return -(-queries // self.lanes) * self.vector + queries * self.query
        one, half, most = few_queries(self.lanes)
        at_one, at_half, at_most = self.few
        if queries <= half:
            return at_one + (at_half - at_one) * (queries - one) / max(1, half - one)
        return at_half + (at_most - at_half) * (queries - half) / (most - half)

    def read_s(self, queries: int) -> float:
        return self.read_few if queries <= self.most_few else self.read_many

    def end_s(self, queries: int) -> float:
        """Of a task whose results are merged, whatever it reads."""
        return self.task + queries * self.partial

    def panels(self, queries: int) -> int:
        return -(-queries // self.panel)


def few_queries(lanes: int) -> tuple[int, int, int]:
    """Those of AttentionCosts.few."""
    return 1, lanes // 4, lanes // 2


def shipped_costs(lanes: int, panel: int) -> AttentionCosts:
    """Of float32, heads of 64 and chunks of 768 keys on an AMD EPYC (Zen 4), with AVX-512 (16 lanes) and AVX2 (8)."""
    us = 1e-6
    if lanes == 16:
        few, copy, vector = (10.0 * us, 12.3 * us, 22.8 * us), 9.0 * us, 16.5 * us
    else:
        few, copy, vector = (12.0 * us, 13.5 * us, 18.6 * us), 22.0 * us, 6.0 * us
    return AttentionCosts(lanes, panel, few, copy, vector, 0.8 * us, 15.0 * us, 30.0 * us, 0.32 * us, 0.07 * us)


SHIPPED = shipped_costs(16, 64)


# ---- from times


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of calls on one thread with a task of so many queries and `kv_heads` heads. cold, warm: over a chunk of keys, from
    memory and from the caches; empty: over one key. further_task: what another task adds to a call over one key."""

    kv_heads: int
    cold: dict[int, float]
    warm: dict[int, float]
    empty: dict[int, float]
    further_task: float


def timed_queries(lanes: int, panel: int) -> tuple[int, ...]:
    """Those that `Times.warm` and `cold` need."""
    return (*few_queries(lanes), lanes, panel - lanes + 1, panel)


def costs_of(times: Times, lanes: int, panel: int) -> AttentionCosts:
    """Solves for the coefficients. None is negative, and more queries never take less."""
    partial = max(0.0, times.empty[panel] - times.empty[1]) / (panel - 1)  # of all heads, as what follows
    chunk = {queries: warm - times.empty[1] - (queries - 1) * partial for queries, warm in times.warm.items()}
    query = max(0.0, chunk[panel] - chunk[panel - lanes + 1]) / (lanes - 1)
    vector = max(0.0, (chunk[panel] - chunk[lanes]) / (panel // lanes - 1) - lanes * query)
    copy = max(0.0, chunk[lanes] - vector - lanes * query)
    most = copy + vector + (lanes // 2 + 1) * query
    few: list[float] = []
    for queries in reversed(few_queries(lanes)):
        most = min(most, chunk[queries])
        few.append(most)
    few_read, read_many = (max(0.0, times.cold[each] - times.warm[each]) for each in (few_queries(lanes)[1], lanes))
    read_few = min(few_read, read_many / 2)  # timed less surely: too much of it would make losses look like gains
    one, half, all_few, copy, vector, query, read_few, read_many, task, partial = (
        each / times.kv_heads
        for each in (*reversed(few), copy, vector, query, read_few, read_many, times.further_task, partial)
    )
    return AttentionCosts(
        lanes,
        panel,
        (one, half, all_few),
        copy,
        vector,
        query,
        read_few,
        read_many,
        max(0.0, task),
        partial,
    )


def is_plausible(costs: AttentionCosts, shipped: AttentionCosts) -> bool:
    """Whether the proportions are such as a machine can have."""
    pairs = zip(_parts(costs), _parts(shipped), strict=True)
    if not all(known / _IMPLAUSIBLE <= part <= known * _IMPLAUSIBLE for part, known in pairs):
        return False
    return max(costs.read_few, costs.read_many, costs.end_s(costs.panel)) <= costs.chunk_s(costs.panel)


def _parts(costs: AttentionCosts) -> Iterator[float]:
    panel_s = costs.chunk_s(costs.panel)
    for part in (*costs.few, costs.copy, costs.vector, costs.lanes * costs.query):
        yield part / panel_s if panel_s > 0 else 0.0
