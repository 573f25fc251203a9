"""Owns paged attention with the C++ kernels: a step's tasks as arrays, and their run in every layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.attention_plan import Cut, Reader, TaskList, plan
from engine.kernels.library import AttentionTasks, Kernels
from engine.paged_attention import PagedPool
from engine.step_batch import StepBatch, block_ids


class KernelAttention:
    """Implements engine.paged_attention.PagedAttention. `windows`: per layer, 0 or how many positions a row sees."""

    def __init__(self, pool: torch.Tensor, kernels: Kernels, windows: Sequence[int], *, share: bool) -> None:
        self._pool = PagedPool(pool)
        self._kernels = kernels
        self._windows = tuple(windows)
        self._share = share

    def step(self, batch: StepBatch) -> KernelStepAttention:
        readers = [
            Reader(start, part.count, part.sequence.computed, block_ids(part))
            for part, start in zip(batch.parts, batch.starts, strict=True)
        ]
        ends = batch.positions.to(torch.int32) + 1
        by_window = {window: self._tasks(readers, ends, window) for window in set(self._windows)}
        tasks = [by_window[window] for window in self._windows]
        return KernelStepAttention(self._pool, self._kernels, batch.slots, tasks)

    def _tasks(self, readers: Sequence[Reader], ends: torch.Tensor, window: int) -> AttentionTasks:
        units = -(-2 * torch.get_num_threads() // self._pool.kv_heads)
        cut = Cut(self._kernels.chunk, self._pool.page_tokens, window, units, self._share)
        begins = (ends - window).clamp_(min=0) if window else torch.zeros_like(ends)
        return task_arrays(plan(readers, cut), readers, begins, ends)


class KernelStepAttention:
    def __init__(self, pool: PagedPool, kernels: Kernels, slots: torch.Tensor, tasks: Sequence[AttentionTasks]) -> None:
        self._pool = pool
        self._kernels = kernels
        self._slots = slots
        self._tasks = tasks

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._kernels.write(key, value, self._slots, self._pool.layers[layer])

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return self._kernels.attention(query, self._pool.layers[layer], self._tasks[layer])


def task_arrays(tasks: TaskList, readers: Sequence[Reader], begins: torch.Tensor, ends: torch.Tensor) -> AttentionTasks:
    """begins, ends: int32 [rows], the positions that each row sees."""
    block_starts = np.cumsum([0, *(len(reader.blocks) for reader in readers[:-1])])
    slot_starts, slots, merged_rows, merged_starts = _slots(tasks, readers)
    rows_before = np.cumsum([0, *tasks.counts[:-1]])
    return AttentionTasks(
        begins=begins,
        ends=ends,
        task_rows=_int32(rows_before),
        task_counts=_int32(tasks.counts),
        task_blocks=_int32(block_starts[tasks.readers]),
        task_chunks=_int32(tasks.chunks),
        task_slots=_int32(slot_starts),
        rows=_int32(np.concatenate(tasks.rows)),
        blocks=_int32(np.concatenate([reader.blocks for reader in readers])),
        slots=_int32(slots),
        merged_rows=_int32(merged_rows),
        merged_starts=_int32(merged_starts),
        slot_count=len(slots),
    )


def _slots(tasks: TaskList, readers: Sequence[Reader]) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
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
