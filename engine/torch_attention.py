"""Owns paged attention with torch's operators: on CUDA, and on CPUs for which the kernels are not built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.attention import attend_all, attend_causal, attend_masked, attend_rows, merge
from engine.paged_attention import PagedPool
from engine.step_batch import StepBatch

_MAX_PADDING = 2  # rows whose page counts differ by more than this factor are attended in separate calls
_LEAST_PAGES = 8


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [start, start + count) are consecutive tokens of one sequence, `past` tokens of which lie in the pool already."""

    start: int
    count: int
    past: int
    blocks: torch.Tensor  # int64 [pages], ids: of the past and of the rows themselves


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows of one token each, of sequences of similar length. The new token's own KV is in the pool when they are attended."""

    rows: torch.Tensor  # int64 [b]
    blocks: torch.Tensor  # int64 [b, pages], padded with a valid id
    lengths: torch.Tensor  # int64 [b], tokens up to the row's own


class TorchAttention:
    """Implements engine.paged_attention.PagedAttention. `windows`: per layer, 0 or how many positions a row sees."""

    def __init__(self, pool: torch.Tensor, windows: Sequence[int]) -> None:
        self._pool = PagedPool(pool)
        self._windows = tuple(windows)

    def step(self, batch: StepBatch) -> TorchStepAttention:
        pool = self._pool
        spans = [_span(batch, ordinal, pool) for ordinal, part in enumerate(batch.parts) if part.count > 1]
        return TorchStepAttention(pool, self._windows, batch.slots, _groups(batch, pool), spans)


class TorchStepAttention:
    def __init__(
        self,
        pool: PagedPool,
        windows: Sequence[int],
        slots: torch.Tensor,
        groups: Sequence[RowGroup],
        spans: Sequence[Span],
    ) -> None:
        self._pool = pool
        self._windows = windows
        self._places = pool.rows(slots)
        self._groups = groups
        self._spans = spans
        self._masks: dict[int, list[torch.Tensor]] = {}  # by window, one per group

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._pool.write(layer, self._places, key, value)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        attended, window = torch.empty_like(query), self._windows[layer]
        key, value = (self._pool.stored(x).to(x.dtype) for x in (key, value))  # as later rows will read them
        for group, mask in zip(self._groups, self._masks_of(window, query.dtype), strict=True):
            keys, values = self._pool.gather(layer, group.blocks, query.dtype)
            places = torch.arange(keys.shape[1], device=keys.device)
            clear_behind(keys, values, (places >= group.lengths.unsqueeze(1))[:, :, None, None])
            attended[group.rows] = attend_rows(query[group.rows], keys, values, mask).output
        for span in self._spans:
            part = slice(span.start, span.start + span.count)
            if window:
                attended[part] = self._attend_window(layer, query[part], span, window)
            else:
                attended[part] = self._attend_span(layer, query[part], key[part], value[part], span)
        return attended

    def _attend_span(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, span: Span
    ) -> torch.Tensor:
        own = attend_causal(query, key, value)
        if not span.past:
            return own.output
        keys, values = self._pool.gather(layer, span.blocks[: -(-span.past // self._pool.page_tokens)], query.dtype)
        return merge(attend_all(query, keys[: span.past], values[: span.past]), own).output.to(query.dtype)

    def _attend_window(self, layer: int, query: torch.Tensor, span: Span, window: int) -> torch.Tensor:
        keys, values = self._pool.gather(layer, span.blocks, query.dtype)
        places = torch.arange(len(keys), device=keys.device)
        clear_behind(keys, values, (places >= span.past + span.count)[:, None, None])
        ends = torch.arange(span.past, span.past + span.count, device=query.device) + 1
        return attend_masked(query, keys, values, visible(ends, window, len(keys), query.dtype)).output

    def _masks_of(self, window: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """[b, 1, 1, pages * page tokens] of each group."""
        if window not in self._masks:
            counts = [group.blocks.shape[1] * self._pool.page_tokens for group in self._groups]
            masks = [
                visible(group.lengths, window, count, dtype) for group, count in zip(self._groups, counts, strict=True)
            ]
            self._masks[window] = [mask[:, None, None, :] for mask in masks]
        return self._masks[window]


def clear_behind(keys: torch.Tensor, values: torch.Tensor, behind: torch.Tensor) -> None:
    """Zeroes what lies behind the last token of a sequence: left there by a former owner of the block, it may be NaN, and a weight
    of 0 does not make that harmless."""
    for each in (keys, values):
        each.masked_fill_(behind, 0)


def visible(ends: torch.Tensor, window: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """[n, count]: 0 where a row that ends before ends[i] sees a place, else -inf."""
    places, lasts = torch.arange(count, device=ends.device), ends.unsqueeze(1)
    hidden = (places >= lasts) | (places < lasts - window) if window else places >= lasts
    return torch.zeros(len(ends), count, dtype=dtype, device=ends.device).masked_fill_(hidden, float("-inf"))


def _span(batch: StepBatch, ordinal: int, pool: PagedPool) -> Span:
    part = batch.parts[ordinal]
    past = part.sequence.computed
    pages = -(-(past + part.count) // pool.page_tokens)
    blocks = batch.blocks.of(ordinal)[:pages].astype(np.int64)
    return Span(batch.starts[ordinal], part.count, past, torch.from_numpy(blocks).to(pool.device))


def _groups(batch: StepBatch, pool: PagedPool) -> list[RowGroup]:
    """Rows by length, so that padding to the longest of a group at most doubles what is read."""
    lengths = np.array([part.sequence.computed + 1 for part in batch.parts if part.count == 1], dtype=np.int64)
    pages = -(-lengths // pool.page_tokens)
    groups: list[list[int]] = []
    for row in np.argsort(pages, kind="stable").tolist():
        if not groups or pages[row] > max(_LEAST_PAGES, _MAX_PADDING * pages[groups[-1][0]]):
            groups.append([])
        groups[-1].append(row)
    return [_group(np.array(rows), lengths, pages, batch, pool) for rows in groups]


def _group(rows: np.ndarray, lengths: np.ndarray, pages: np.ndarray, batch: StepBatch, pool: PagedPool) -> RowGroup:
    most = int(pages[rows].max())
    blocks = batch.blocks.table[batch.blocks.lines[rows], :most].astype(np.int64)
    behind = np.arange(most) >= pages[rows, None]
    blocks = np.where(behind, blocks[:, :1], blocks)  # masked, but never another prompt's
    columns = (rows, blocks, lengths[rows])
    return RowGroup(*(torch.from_numpy(each).to(pool.device) for each in columns))
