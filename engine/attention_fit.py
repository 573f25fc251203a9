"""Owns the fit of what attention costs on this machine: the kernels, timed at start-up on a small pool of the model's shape."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from engine.attention_cost import AttentionCosts, Times, costs_of, is_plausible, shipped_costs, timed_queries
from engine.attention_plan import Reader, TaskList
from engine.kernel_attention import ReaderBlocks, task_arrays
from engine.kernels.library import AttentionCall, Kernels
from service_kit.logs import get_logger

_log = get_logger(__name__)

# More than most last caches hold, or a core's part of them: what is read after so much else comes from memory.
_POOL_BYTES = 64 << 20
# What one reader leaves there for the next one: three quarters of the last cache of the machine that this was measured on.
_CACHED_BYTES = 24 << 20
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 5
_BUDGET_S = 0.03  # after which no further round is begun
_WARM_CALLS = 2
_ATTEMPTS = 2
_TASKS = 9  # of the call that tells what a further task takes


@dataclass(frozen=True, slots=True)
class KvShape:
    kv_heads: int
    dim: int
    page_tokens: int
    dtype: torch.dtype


@functools.cache
def fitted_costs(kernels: Kernels, shape: KvShape) -> AttentionCosts:
    """Of this machine; those that are shipped where what was measured is implausible. Takes some tens of milliseconds, once per
    process and shape, and is logged. `shape.page_tokens` divides a chunk."""
    begin_s, threads = time.perf_counter(), torch.get_num_threads()
    shipped = shipped_costs(kernels.lanes, kernels.panel)
    calls = _Calls(kernels, shape)
    torch.set_num_threads(1)  # of a busy machine others would wait for a core at the end of every call
    try:
        for _ in range(_ATTEMPTS):
            measured = costs_of(_times(calls), kernels.lanes, kernels.panel)
            plausible = is_plausible(measured, shipped)
            if plausible:
                break
    finally:
        torch.set_num_threads(threads)
    took_ms = round((time.perf_counter() - begin_s) * 1e3, 1)
    _log.info("attention_fitted", plausible=plausible, took_ms=took_ms, microseconds=_microseconds(measured))
    return replace(measured if plausible else shipped, cached_chunks=calls.cached_chunks)


def _microseconds(costs: AttentionCosts) -> dict[str, object]:
    names = (name for name in asdict(costs) if name not in ("lanes", "panel"))
    return {name: np.round(np.multiply(getattr(costs, name), 1e6), 2).tolist() for name in names}


class _Calls:
    """Calls of tasks over one chunk of keys each. Every query head has a KV head of its own: a task has as many queries as rows."""

    def __init__(self, kernels: Kernels, shape: KvShape) -> None:
        self._kernels = kernels
        self.shape = shape
        self.queries = timed_queries(kernels.lanes, kernels.panel)
        self.keys = kernels.chunk
        self._chunk_pages = kernels.chunk // shape.page_tokens
        page = (2, shape.page_tokens, shape.kv_heads, shape.dim)
        chunk_bytes = self._chunk_pages * int(np.prod(page)) * shape.dtype.itemsize
        self.cached_chunks = _CACHED_BYTES // chunk_bytes
        self.chunks = max(_TASKS, _POOL_BYTES // chunk_bytes)
        raw = torch.full((self.chunks * chunk_bytes,), 0x38, dtype=torch.uint8)  # a small number in every dtype
        self._pool = raw.view(shape.dtype).view(-1, *page)

    def over(self, keys: int, queries: int, tasks: int = 1) -> Callable[[int], float]:
        """Seconds of `tasks` tasks of so many queries and keys; the first one's are those of the chunk that is given."""
        rows = tasks * queries
        blocks = np.arange(self.chunks * self._chunk_pages, dtype=np.int32)
        readers = [Reader(task * queries, queries, 0, blocks) for task in range(tasks)]
        cut = TaskList()
        for task in range(tasks):
            cut.add(readers, (task,), (0, 1), merged=True)
        begins, ends = torch.zeros(rows, dtype=torch.int32), torch.full((rows,), keys, dtype=torch.int32)
        arrays = task_arrays(cut, ReaderBlocks(torch.from_numpy(blocks), np.zeros(tasks, dtype=np.int64)), begins, ends)
        call = AttentionCall(self._kernels, arrays)
        query = torch.full((rows, self.shape.kv_heads, self.shape.dim), 0.5)

        def seconds(chunk: int) -> float:
            arrays.task_blocks.fill_(chunk * self._chunk_pages)
            begin_s = time.perf_counter()
            call(query, self._pool)
            return time.perf_counter() - begin_s

        return seconds


def _times(calls: _Calls) -> Times:
    """The least of each."""
    whole = calls.queries[-1]
    timed = {queries: calls.over(calls.keys, queries) for queries in calls.queries}
    empty = {queries: calls.over(1, queries) for queries in (1, whole)}
    further = calls.over(1, 1, _TASKS)
    cold, warm, nothing = ({queries: float("inf") for queries in calls.queries} for _ in range(3))
    many = float("inf")
    until_s, chunk = time.perf_counter() + _BUDGET_S, 0
    for round_ in range(_MOST_ROUNDS):
        if round_ >= _LEAST_ROUNDS and time.perf_counter() > until_s:
            break
        for queries, seconds in timed.items():
            first_s, *others_s = (seconds(chunk) for _ in range(1 + _WARM_CALLS))
            # A call's first round also gets its memory.
            cold[queries] = min(cold[queries], first_s if round_ else float("inf"))
            warm[queries] = min(warm[queries], *others_s)
            chunk = (chunk + 1) % calls.chunks
        for queries, seconds in empty.items():
            nothing[queries] = min(nothing[queries], *(seconds(0) for _ in range(1 + _WARM_CALLS)))
        many = min(many, *(further(0) for _ in range(1 + _WARM_CALLS)))
    further_task = (many - nothing[1]) / (_TASKS - 1)
    return Times(calls.shape.kv_heads, cold, warm, nothing, further_task)
