"""Owns the work of a step's attention as units on threads, and what of it is faster shared. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.attention_cost import AttentionCosts

# Where no unit is larger than this part of a thread's share, it does not matter how units fall on threads.
_FINE = 0.02
# Of what its members take alone, a shared run has to save so much: the fit is not more exact.
_LEAST_GAIN = 0.02
# The same where units are coarse, because kernels take a cut in which the busiest thread has up to a tenth more than its share, and
# where few queries become many, which wait for memory in another way.
_LEAST_UNSURE_GAIN = 0.06


@dataclass(frozen=True, slots=True)
class Threads:
    """What a step runs on; a task is cut into units of a KV head and a panel."""

    count: int = 1
    kv_heads: int = 1

    @property
    def units(self) -> int:
        """As many tasks keep all threads busy, two per thread."""
        return -(-2 * self.count // self.kv_heads)

    def seconds(self, unit_s: np.ndarray, counts: np.ndarray) -> tuple[float, bool]:
        """Least time for counts[i] units of unit_s[i] seconds: an even share, or that of a thread that gets one unit more than others.
        And whether the units are coarse."""
        even = float(unit_s @ counts) / self.count
        if self.count == 1 or unit_s.max() <= _FINE * even:
            return even, False
        order = np.argsort(-unit_s)
        rounds = -(-counts[order].cumsum() // self.count)
        return max(even, float((rounds * unit_s[order]).max())), True


ONE_THREAD = Threads()


@dataclass(frozen=True, slots=True)
class Run:
    """`members` hold the same blocks in the chunks [begin, end), and read them together: in one task, or one per chunk."""

    members: tuple[int, ...]
    begin: int
    end: int
    whole: bool = False


class StepWork:
    """The units of a step's tasks; at first of readers that share nothing. queries: of each reader, of a KV head; chunks: of keys that
    it sees, the last in part; split: whether the chunks of a reader that shares nothing are tasks of their own."""

    def __init__(
        self, costs: AttentionCosts, threads: Threads, queries: Sequence[int], chunks: Sequence[float], *, split: bool
    ) -> None:
        self._costs = costs
        self._threads = threads
        self._queries = queries
        self._chunks = chunks
        by_queries = {each: costs.chunk_s(each) for each in set(queries)}
        self._rates = [by_queries[each] for each in queries]
        # Of every reader what it reads by itself, then two of every shared run, which are fewer than twice the readers.
        self._unit_s = np.zeros(5 * len(queries))
        self._counts = np.zeros(5 * len(queries))
        self._used = len(queries)
        for reader, seen in enumerate(chunks):
            self._unit_s[reader], self._counts[reader] = self._own(reader, seen, split=split)
        self._seconds, _ = self._total()

    def shared(self, members: tuple[int, ...], begin: int, end: int) -> Run | None:
        """The run, cut as it is fastest, if it is faster shared than not; then its members share it from here on. Those of a reader
        come in the order of their chunks."""
        assert len(members) > 1
        where, chunks = list(members), end - begin
        before = self._unit_s[where], self._counts[where]
        own = [self._own(member, self._chunks[member] - end, split=True) for member in members]
        self._unit_s[where], self._counts[where] = zip(*own, strict=True)
        self._used += 2
        tasks = self._task_counts(members, begin, end)
        cuts = [(*self._with_shared(members, chunks, each), each) for each in tasks]
        least_s, coarse, cut = min(cuts)
        alone_s = chunks * sum(self._rates[member] for member in members) * self._threads.kv_heads / self._threads.count
        unsure = coarse or self._becomes_many(members)
        least_gain_s = (_LEAST_UNSURE_GAIN if unsure else _LEAST_GAIN) * alone_s
        if self._seconds + self._reread_s(members, chunks) - least_s < least_gain_s:
            self._used -= 2
            self._unit_s[where], self._counts[where] = before
            return None
        if cut != tasks[-1]:
            self._with_shared(members, chunks, cut)
        self._seconds = least_s
        return Run(members, begin, end, whole=cut == 1)

    def _task_counts(self, members: Sequence[int], begin: int, end: int) -> list[int]:
        """Into how many tasks a shared run may be cut. What was merged before may not be merged again in another order: only one that
        begins with the first chunk may be a single task. On several threads that was measured to be slower where threads outnumber KV
        heads, and where all queries are in one panel, which waits for memory."""
        if begin or self._threads.count > self._threads.kv_heads:
            return [end - begin]
        if end == 1 or self._threads.count == 1:
            return [1]
        return [end] if sum(self._queries[member] for member in members) <= self._costs.panel else [1, end]

    def _reread_s(self, members: Sequence[int], chunks: int) -> float:
        """What members beyond the first one wait for memory when they read so many chunks one after the other."""
        if chunks <= self._costs.cached_chunks:
            return 0.0
        reads_s = sum(self._costs.read_s(self._queries[member]) for member in members[1:])
        return chunks * reads_s * self._threads.kv_heads / self._threads.count

    def _becomes_many(self, members: Sequence[int]) -> bool:
        queries = [self._queries[member] for member in members]
        return min(queries) <= self._costs.most_few < sum(queries)

    def _total(self) -> tuple[float, bool]:
        return self._threads.seconds(self._unit_s[: self._used], self._counts[: self._used])

    def _own(self, reader: int, chunks: float, *, split: bool) -> tuple[float, int]:
        """(seconds, count) of the units of so many chunks that a reader reads by itself."""
        heads, rate = self._threads.kv_heads, self._rates[reader]
        if not split:
            return chunks * rate + self._costs.task, heads
        tasks = max(1, math.ceil(chunks))
        return chunks / tasks * rate + self._costs.end_s(self._queries[reader]), heads * tasks

    def _with_shared(self, members: Sequence[int], chunks: int, tasks: int) -> tuple[float, bool]:
        """With the last two places for what members read together, in so many tasks: full panels, and the rest."""
        costs, queries = self._costs, sum(self._queries[member] for member in members)
        full, rest = divmod(queries, costs.panel)
        # What panels read together; one of the members would have read the keys from memory too.
        read_s = max(0.0, costs.read_s(queries) - costs.read_s(self._queries[members[0]]))
        common_s = (costs.copy_s(queries) + read_s) / costs.panels(queries)
        for place, (taken, panels) in enumerate(((costs.panel, full), (rest, int(rest > 0))), self._used - 2):
            self._unit_s[place] = panels and chunks / tasks * (costs.sums_s(taken) + common_s) + costs.end_s(taken)
            self._counts[place] = panels * tasks * self._threads.kv_heads
        return self._total()
