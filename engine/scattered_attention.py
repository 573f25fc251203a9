"""Owns attention of scattered rows of one prompt: tokens at any ascending positions, each over all that comes before it.

What the blend of chunks computes. Every row has its own end, its position + 1: the mask is exact whatever lies between two rows.
With the kernels a row's result has the bits that a whole prefill over the same KV would give it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from engine.attention import attend_masked
from engine.attention_plan import MOST_SHARED_ROWS, Reader, TaskList
from engine.kernel_attention import ReaderBlocks, task_arrays
from engine.kernels.library import AttentionTasks, Kernels
from engine.paged_attention import PagedPool
from engine.torch_attention import visible

_TILE_ROWS = 256  # of torch's operators: bounds the mask, and skips the keys that no row of a tile sees


class ScatteredRows(Protocol):
    """Rows at fixed positions of one prompt, in every layer."""

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Puts rotated key and value [n, kv_heads, dim] of the rows into the pool."""

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """query [n, heads, dim] -> [n, heads, dim], over what the pool holds up to each row's own position."""


class ScatteredAttention(Protocol):
    """Contract: tests/engine/test_scattered_attention.py."""

    def rows(self, blocks: np.ndarray, positions: torch.Tensor) -> ScatteredRows:
        """blocks: int32 [pages], of the whole prompt; positions: int64 [n] on the host, ascending, n > 0."""


def open_scattered(pool: torch.Tensor, kernels: Kernels | None, windows: Sequence[int]) -> ScatteredAttention:
    """`windows`: per layer, 0 or how many positions a row sees. Without kernels torch computes, on the pool's device."""
    return TorchScattered(pool, windows) if kernels is None else KernelScattered(pool, kernels, windows)


def _slots(blocks: np.ndarray, positions: torch.Tensor, page_tokens: int) -> torch.Tensor:
    pages = torch.from_numpy(blocks.astype(np.int64)).index_select(0, positions // page_tokens)
    return pages * page_tokens + positions % page_tokens


class KernelScattered:
    def __init__(self, pool: torch.Tensor, kernels: Kernels, windows: Sequence[int]) -> None:
        self._pool = PagedPool(pool)
        self._kernels = kernels
        self._windows = tuple(windows)

    def rows(self, blocks: np.ndarray, positions: torch.Tensor) -> KernelScatteredRows:
        return KernelScatteredRows(self._pool, self._kernels, self._windows, blocks, positions)


class KernelScatteredRows:
    """All rows are one task: the kernels cut it into panels of neighbouring rows, each with ends of its own."""

    def __init__(
        self,
        pool: PagedPool,
        kernels: Kernels,
        windows: Sequence[int],
        blocks: np.ndarray,
        positions: torch.Tensor,
    ) -> None:
        self._pool = pool
        self._kernels = kernels
        self._windows = windows
        self._reader = Reader(0, len(positions), int(positions[0]), blocks.astype(np.int32))
        self._ends = positions.to(torch.int32) + 1
        self._slots = _slots(blocks, positions, pool.page_tokens)
        self._tasks: dict[int, AttentionTasks] = {}  # by window

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._kernels.write(key, value, self._slots, self._pool.layers[layer])

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        window = self._windows[layer]
        if window not in self._tasks:
            self._tasks[window] = self._tasks_of(window)
        return self._kernels.attention(query, self._pool.layers[layer], self._tasks[window])

    def _tasks_of(self, window: int) -> AttentionTasks:
        begins = (self._ends - window).clamp_(min=0) if window else torch.zeros_like(self._ends)
        first, end = int(begins[0]) // self._kernels.chunk, -(-int(self._ends[-1]) // self._kernels.chunk)
        tasks, few = TaskList(), self._reader.count <= MOST_SHARED_ROWS and end > first + 1
        for chunks in [(chunk, chunk + 1) for chunk in range(first, end)] if few else [(first, end)]:
            tasks.add([self._reader], (0,), chunks, merged=few)  # few rows keep all threads busy chunk by chunk
        return task_arrays(tasks, ReaderBlocks.of([self._reader]), begins, self._ends)


class TorchScattered:
    def __init__(self, pool: torch.Tensor, windows: Sequence[int]) -> None:
        self._pool = PagedPool(pool)
        self._windows = tuple(windows)

    def rows(self, blocks: np.ndarray, positions: torch.Tensor) -> TorchScatteredRows:
        return TorchScatteredRows(self._pool, self._windows, blocks, positions)


class TorchScatteredRows:
    def __init__(self, pool: PagedPool, windows: Sequence[int], blocks: np.ndarray, positions: torch.Tensor) -> None:
        self._pool = pool
        self._windows = windows
        self._blocks = torch.from_numpy(blocks.astype(np.int64)).to(pool.device)
        self._ends = torch.split(positions + 1, _TILE_ROWS)
        self._places = pool.rows(_slots(blocks, positions, pool.page_tokens).to(pool.device))

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._pool.write(layer, self._places, key, value)

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        pages = -(-int(self._ends[-1][-1]) // self._pool.page_tokens)
        keys, values = self._pool.gather(layer, self._blocks[:pages], query.dtype)
        window, attended = self._windows[layer], torch.empty_like(query)
        tiles = zip(self._ends, torch.split(query, _TILE_ROWS), torch.split(attended, _TILE_ROWS), strict=True)
        for ends, queries, out in tiles:
            last, first = int(ends[-1]), max(0, int(ends[0]) - window) if window else 0
            mask = visible(ends.to(query.device) - first, window, last - first, query.dtype)
            out.copy_(attend_masked(queries, keys[first:last], values[first:last], mask).output)
        return attended
