"""Owns paged attention with the C++ kernels: a step's tasks as arrays, and their run in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.attention_cost import SHIPPED, AttentionCosts
from engine.attention_plan import Cut, Reader, TaskList, plan
from engine.block_lines import PlacedBlocks
from engine.kernels.library import AttentionCall, AttentionTasks, Kernels
from engine.paged_attention import PagedPool
from engine.step_batch import StepBatch
from engine.step_work import Threads


class KernelAttention:
    """Implements engine.paged_attention.PagedAttention. `windows`: per layer, 0 or how many positions a row sees; `group`: query
    heads of a KV head; `costs`: by which it is judged where sharing pays."""

    def __init__(
        self,
        pool: torch.Tensor,
        kernels: Kernels,
        windows: Sequence[int],
        *,
        share: bool,
        group: int = 1,
        costs: AttentionCosts = SHIPPED,
    ) -> None:
        self._pool = PagedPool(pool)
        self._kernels = kernels
        self._windows = tuple(windows)
        self._share = share
        self._group = group
        self._costs = costs
        self._planned: _Planned | None = None  # for the last step

    def step(self, batch: StepBatch) -> KernelStepAttention:
        positions = batch.positions.numpy()
        planned = self._planned
        if planned is None or planned.blocks is not batch.blocks or positions[0] >= planned.first_until:
            planned = self._planned = self._plan(batch, positions)
        planned.move(positions)
        return KernelStepAttention(self._pool, self._kernels, batch.slots, planned.calls)

    def _plan(self, batch: StepBatch, positions: np.ndarray) -> _Planned:
        readers = [
            Reader(start, part.count, part.sequence.computed, batch.blocks.of(ordinal))
            for ordinal, (part, start) in enumerate(zip(batch.parts, batch.starts, strict=True))
        ]
        by_window = {window: self._tasks(batch, readers, window) for window in set(self._windows)}
        borders = np.concatenate([positions, *(positions + 1 - window for window in by_window if window)])
        steps = self._kernels.chunk - int((borders % self._kernels.chunk).max())
        moved = [(window, tasks.begins.numpy(), tasks.ends.numpy()) for window, tasks in by_window.items()]
        calls = {window: AttentionCall(self._kernels, tasks) for window, tasks in by_window.items()}
        by_layer = [calls[window] for window in self._windows]
        return _Planned(batch.blocks, int(positions[0]) + steps, by_layer, moved)

    def _tasks(self, batch: StepBatch, readers: Sequence[Reader], window: int) -> AttentionTasks:
        threads = Threads(torch.get_num_threads(), self._pool.kv_heads)
        cut = Cut(
            self._kernels.chunk,
            self._pool.page_tokens,
            window,
            threads.units,
            self._share,
            self._group,
            self._costs,
            threads,
        )
        begins, ends = torch.zeros(2, len(batch.positions), dtype=torch.int32)
        blocks = ReaderBlocks(torch.from_numpy(batch.blocks.table), batch.blocks.starts)
        return task_arrays(plan(readers, cut), blocks, begins, ends)


@dataclass(frozen=True, slots=True, eq=False)
class _Planned:
    """The tasks of a step, per layer. They hold in the next ones over the same `blocks`, all of whose rows go on together, until
    one of these comes to a chunk that it did not see, or leaves one behind: when the first row is at `first_until`."""

    blocks: PlacedBlocks
    first_until: int
    calls: list[AttentionCall]
    seen: list[tuple[int, np.ndarray, np.ndarray]]  # window, begins and ends: those of the tasks

    def move(self, positions: np.ndarray) -> None:
        """To rows at `positions`, in place."""
        for window, begins, ends in self.seen:
            np.add(positions, 1, out=ends, casting="same_kind")
            if window:
                np.maximum(ends - window, 0, out=begins)


class KernelStepAttention:
    def __init__(self, pool: PagedPool, kernels: Kernels, slots: torch.Tensor, calls: Sequence[AttentionCall]) -> None:
        self._pool = pool
        self._kernels = kernels
        self._slots = slots
        self._calls = calls

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._kernels.write(key, value, self._slots, self._pool.layers[layer])

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return self._calls[layer](query, self._pool.layers[layer])


@dataclass(frozen=True, slots=True)
class ReaderBlocks:
    """The blocks of reader i begin at `blocks[starts[i]]`."""

    blocks: torch.Tensor  # int32, of any shape
    starts: np.ndarray

    @classmethod
    def of(cls, readers: Sequence[Reader]) -> ReaderBlocks:
        """One behind the other."""
        counts = [len(reader.blocks) for reader in readers]
        return cls(_int32(np.concatenate([reader.blocks for reader in readers])), np.cumsum(counts) - counts)


def task_arrays(tasks: TaskList, blocks: ReaderBlocks, begins: torch.Tensor, ends: torch.Tensor) -> AttentionTasks:
    """begins, ends: int32 [rows], the positions that each row sees."""
    slot_starts, slots, merged_rows, merged_starts = _slots(tasks)
    rows_before = np.cumsum([0, *tasks.counts[:-1]])
    return AttentionTasks(
        begins=begins,
        ends=ends,
        task_rows=_int32(rows_before),
        task_counts=_int32(tasks.counts),
        task_blocks=_int32(blocks.starts[tasks.readers]),
        task_chunks=_int32(tasks.chunks),
        task_slots=_int32(slot_starts),
        rows=_int32(np.concatenate(tasks.rows)),
        blocks=blocks.blocks,
        slots=_int32(slots),
        merged_rows=_int32(merged_rows),
        merged_starts=_int32(merged_starts),
        slot_count=len(slots),
    )


def _slots(tasks: TaskList) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
    """A slot for every row of every merged task; those of one row lie together, in the order of their chunks.

    Returns (per task its start in the slots or -1, the slots, the merged rows, per merged row its first slot and the end).
    """
    merged = [task for task in range(len(tasks.counts)) if tasks.merged[task]]
    starts = [-1] * len(tasks.counts)
    if not merged:
        return starts, np.zeros(0), np.zeros(0), np.zeros(1)
    rows = np.concatenate([tasks.rows[task] for task in merged])
    first_chunks = np.repeat([tasks.chunks[task][0] for task in merged], [tasks.counts[task] for task in merged])
    order = np.lexsort((first_chunks, rows))
    slots = np.empty(len(rows), dtype=np.int64)
    slots[order] = np.arange(len(rows))
    merged_rows, counts = np.unique(rows, return_counts=True)
    at = 0
    for task in merged:
        starts[task] = at
        at += tasks.counts[task]
    return starts, slots, merged_rows, np.concatenate([[0], np.cumsum(counts)])


def _int32(values: Sequence[object] | np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32))
