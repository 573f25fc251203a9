"""Owns the tensors of one step: which row of the batch is which token of which sequence, and where its KV goes.

They lie in memory that persists: a step over the sequences of the step before writes four numbers per row, and plans that were
made for them hold. Block tables are copied where sequences came or grew by more than a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.block_lines import BlockLines, PlacedBlocks
from engine.block_tables import Table
from engine.schedule import Part


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All parts of a step in one batch of n rows; the single-token parts come first. Valid until the next one is built.

    blocks: of each part, up to the token of its last row. The same object as in the step before says: the same sequences with
    a row each, each a token further, and of their blocks only the one that is written may be another.
    """

    parts: tuple[Part, ...]
    starts: tuple[int, ...]  # first row of each part
    token_ids: torch.Tensor  # int64 [n]
    positions: torch.Tensor  # int64 [n]
    slots: torch.Tensor  # int64 [n]: block * page_tokens + offset
    highest_position: int
    blocks: PlacedBlocks

    def last_row(self, ordinal: int) -> int:
        return self.starts[ordinal] + self.parts[ordinal].count - 1


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """What the next step has in common with this one, if it is over the same decoding sequences."""

    tables: tuple[Table, ...]
    starts: tuple[int, ...]
    numbers: np.ndarray  # int64 [5, n]: token ids, positions, slots; of parts of one token also page and block
    columns: tuple[torch.Tensor, ...]  # the first three, on the host
    blocks: PlacedBlocks


class StepBuffers:
    """Builds one batch after the other for one forward pass."""

    def __init__(self, page_tokens: int, device: torch.device) -> None:
        self._page_tokens = page_tokens
        self._device = device
        self._numbers = np.empty(0, dtype=np.int64)
        self._lines = BlockLines()
        self._rows: _Rows | None = None
        self._next: list[int] | None = None  # positions of the next step over the same; None: prompts were among them

    def build(self, parts: Sequence[Part]) -> StepBatch:
        """Every sequence of `parts` holds a table with room for its tokens."""
        singles = [part for part in parts if part.count == 1]
        ordered = (*singles, *(part for part in parts if part.count > 1))
        tables, positions = _tables(ordered), [part.sequence.computed for part in singles]
        rows = self._rows
        if rows is None or tables != rows.tables or positions != self._next or self._beyond_lines(positions):
            rows = self._rows = self._enter(ordered, tables)
        self._fill_singles(rows, singles, positions)
        for part, start in zip(ordered[len(singles) :], rows.starts[len(singles) :], strict=True):
            self._fill(part, rows.numbers[:3, start : start + part.count])
        self._next = [position + 1 for position in positions] if len(singles) == len(parts) else None
        highest = max(part.sequence.computed + part.count for part in ordered) - 1
        token_ids, places, slots = self._on_device(rows)
        return StepBatch(ordered, rows.starts, token_ids, places, slots, highest, rows.blocks)

    def _beyond_lines(self, positions: Sequence[int]) -> bool:
        return max(positions, default=0) >= self._lines.pages * self._page_tokens

    def _enter(self, parts: tuple[Part, ...], tables: tuple[Table, ...]) -> _Rows:
        counts = np.array([part.count for part in parts])
        pages = [(part.sequence.computed + part.count - 1) // self._page_tokens + 1 for part in parts]
        starts = np.cumsum(counts) - counts
        numbers = self._room(int(counts.sum()))
        columns = tuple(torch.from_numpy(numbers[:3]).unbind())
        return _Rows(tables, tuple(starts.tolist()), numbers, columns, self._lines.place(tables, pages))

    def _room(self, rows: int) -> np.ndarray:
        if self._numbers.size < 5 * rows:
            self._numbers = np.empty(max(5 * rows, 2 * self._numbers.size), dtype=np.int64)
        return self._numbers[: 5 * rows].reshape(5, rows)

    def _fill_singles(self, rows: _Rows, singles: Sequence[Part], positions: Sequence[int]) -> None:
        """Reads each row's numbers once and hands them to numpy together: for few rows that is all this costs."""
        page_tokens, count = self._page_tokens, len(singles)
        token_ids = [part.sequence.tokens[position] for part, position in zip(singles, positions, strict=True)]
        pages = [position // page_tokens for position in positions]
        blocks = [table.blocks[page] for table, page in zip(rows.tables, pages, strict=False)]
        slots = [block * page_tokens + at % page_tokens for block, at in zip(blocks, positions, strict=True)]
        rows.numbers[:, :count] = (token_ids, positions, slots, pages, blocks)
        self._lines.write(rows.blocks.lines[:count], rows.numbers[3, :count], rows.numbers[4, :count])

    def _fill(self, part: Part, numbers: np.ndarray) -> None:
        first, end = part.sequence.computed, part.sequence.computed + part.count
        places = np.arange(first, end, dtype=np.int64)
        assert part.sequence.table is not None
        blocks = np.frombuffer(part.sequence.table.blocks, dtype=np.int32)[places // self._page_tokens].astype(np.int64)
        tokens = np.frombuffer(part.sequence.tokens, dtype=np.int32)[first:end]
        numbers[:] = tokens, places, blocks * self._page_tokens + places % self._page_tokens

    def _on_device(self, rows: _Rows) -> tuple[torch.Tensor, ...]:
        """Elsewhere than on the CPU the host waits until all is copied."""
        if self._device.type == "cpu":
            return rows.columns
        return tuple(torch.from_numpy(rows.numbers[:3]).to(self._device).unbind())


def _tables(parts: Sequence[Part]) -> tuple[Table, ...]:
    tables = tuple([part.sequence.table for part in parts if part.sequence.table is not None])
    assert len(tables) == len(parts)
    return tables
