"""Owns the cut of one step's attention into tasks: which rows read which chunks of keys together. Pure.

A shared prefix is read once for all its rows (Hydragen, algorithm card 2), at every level of the tree that prompts form, found
in the block tables themselves: sequences that share a prefix hold the same blocks. Chunks are the unit of sharing, and results
are merged chunk by chunk from left to right, so a row's result has the same bits however the tasks are cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.attention_cost import SHIPPED, AttentionCosts
from engine.step_work import ONE_THREAD, Run, StepWork, Threads

# Parts of more rows fill the vectors of a task by themselves: sharing would save them nothing.
MOST_SHARED_ROWS = 16

# Of one KV head, of a member: its rows times the query heads that share the KV head. With more, it was 0.96 to 1.02 times as fast.
_MOST_QUERIES = 96


@dataclass(frozen=True, slots=True)
class Reader:
    """Rows [start, start + count) of the batch: the tokens from position `first` on of the sequence that holds `blocks`."""

    start: int
    count: int
    first: int
    blocks: np.ndarray  # int32


@dataclass(frozen=True, slots=True)
class Cut:
    """`chunk_tokens` per chunk; `window`: 0, or how many positions a row sees; `units`: as many tasks keep all threads busy, two
    per thread; `group`: query heads of a KV head. By `costs` and `threads` it is judged where sharing pays."""

    chunk_tokens: int
    page_tokens: int
    window: int = 0
    units: int = 1
    share: bool = True
    group: int = 1
    costs: AttentionCosts = SHIPPED
    threads: Threads = ONE_THREAD


@dataclass(slots=True)
class TaskList:
    """Columns of the tasks, as struct Attention of kernels.cpp wants them."""

    rows: list[np.ndarray] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    readers: list[int] = field(default_factory=list)  # whose blocks are read
    chunks: list[tuple[int, int]] = field(default_factory=list)
    members: list[tuple[int, ...]] = field(default_factory=list)
    merged: list[bool] = field(default_factory=list)  # False: the task writes the output

    def add(
        self, readers: Sequence[Reader], members: tuple[int, ...], chunks: tuple[int, int], *, merged: bool
    ) -> None:
        rows = [np.arange(readers[m].start, readers[m].start + readers[m].count, dtype=np.int32) for m in members]
        self.rows.append(np.concatenate(rows))
        self.counts.append(len(self.rows[-1]))
        self.readers.append(members[0])
        self.chunks.append(chunks)
        self.members.append(members)
        self.merged.append(merged)


def plan(readers: Sequence[Reader], cut: Cut) -> TaskList:
    runs = list(shared_runs(readers, cut)) if cut.share and not cut.window else []
    shared_to = dict.fromkeys(range(len(readers)), 0)
    tasks = TaskList()
    for run in runs:
        for chunks in [(run.begin, run.end)] if run.whole else [(c, c + 1) for c in range(run.begin, run.end)]:
            tasks.add(readers, run.members, chunks, merged=True)
        for member in run.members:
            shared_to[member] = run.end
    for index, reader in enumerate(readers):
        begin = shared_to[index] or max(0, reader.first + 1 - cut.window if cut.window else 0) // cut.chunk_tokens
        end = -(-(reader.first + reader.count) // cut.chunk_tokens)
        split = shared_to[index] > 0 or (
            reader.count <= MOST_SHARED_ROWS and len(readers) < cut.units and end > begin + 1
        )
        for chunks in [(c, c + 1) for c in range(begin, end)] if split else [(begin, end)]:
            tasks.add(readers, (index,), chunks, merged=split)
    return tasks


def shared_runs(readers: Sequence[Reader], cut: Cut) -> Iterator[Run]:
    """Runs of chunks that two or more readers share because it is faster, those of a reader in order. Only chunks whose keys all
    rows see whole."""
    if cut.chunk_tokens % cut.page_tokens:
        return  # a chunk's borders lie inside blocks
    most = min(MOST_SHARED_ROWS, _MOST_QUERIES // cut.group)
    full = [reader.first // cut.chunk_tokens if reader.count <= most else 0 for reader in readers]
    work: StepWork | None = None
    # Groups whose members hold the same blocks up to `chunk`; those up to `begin` are in runs.
    open_groups = [(tuple(index for index, chunks in enumerate(full) if chunks), 0, 0)]
    pages = cut.chunk_tokens // cut.page_tokens
    while open_groups:
        members, begin, chunk = open_groups.pop()
        by_content: dict[bytes, list[int]] = {}
        for member in members:
            if full[member] > chunk:
                content = readers[member].blocks[chunk * pages : (chunk + 1) * pages].tobytes()
                by_content.setdefault(content, []).append(member)
        for group in by_content.values():
            if len(group) > 1:
                end = chunk + _common_chunks([readers[m].blocks[chunk * pages : full[m] * pages] for m in group], pages)
                work = work or _work(readers, cut)
                run = work.shared(tuple(group), begin, end)
                if run:
                    yield run
                # What did not pay for all of them may pay for some, who share more chunks.
                open_groups.append((tuple(group), end if run else begin, end))


def _work(readers: Sequence[Reader], cut: Cut) -> StepWork:
    queries = [reader.count * cut.group for reader in readers]
    chunks = [(reader.first + reader.count) / cut.chunk_tokens for reader in readers]
    return StepWork(cut.costs, cut.threads, queries, chunks, split=len(readers) < cut.units)


def _common_chunks(tables: Sequence[np.ndarray], pages: int) -> int:
    shortest = min(map(len, tables))
    lines = np.stack([table[:shortest] for table in tables])
    same = (lines == lines[0]).all(axis=0)
    return (shortest if same.all() else int(same.argmin())) // pages
