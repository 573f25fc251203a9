"""Owns the tensors of one step: which row of the batch is which token of which sequence, and where its KV goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.schedule import Part

_MAX_PADDING = 2  # rows whose page counts differ by more than this factor are attended in separate calls
_LEAST_PAGES = 8


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [start, start + count) are consecutive tokens of one sequence, `past` tokens of which lie in the pool already."""

    start: int
    count: int
    past: int
    blocks: torch.Tensor  # int64 [pages of the past], ids


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows of one token each, of sequences of similar length. The new token's own KV is in the pool when they are attended."""

    rows: torch.Tensor  # int64 [b]
    blocks: torch.Tensor  # int64 [b, pages], padded with a valid id
    lengths: torch.Tensor  # int64 [b], tokens to attend to


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All parts of a step in one batch of n rows; the single-token parts come first."""

    parts: tuple[Part, ...]
    starts: tuple[int, ...]  # first row of each part
    token_ids: torch.Tensor  # int64 [n]
    positions: torch.Tensor  # int64 [n]
    slots: torch.Tensor  # int64 [n]: block * page_tokens + offset
    highest_position: int
    groups: tuple[RowGroup, ...]
    spans: tuple[Span, ...]

    def last_row(self, ordinal: int) -> int:
        return self.starts[ordinal] + self.parts[ordinal].count - 1


def build(parts: Sequence[Part], page_tokens: int, device: torch.device) -> StepBatch:
    """Every sequence of `parts` holds a table with room for its tokens."""
    ordered = tuple(sorted(parts, key=lambda part: part.count > 1))  # stable
    starts: list[int] = []
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    spans: list[Span] = []
    row = 0
    for part in ordered:
        table = _table(part)
        first, end = part.sequence.computed, part.sequence.computed + part.count
        places = np.arange(first, end, dtype=np.int64)
        ids.append(np.frombuffer(part.sequence.tokens, dtype=np.int32)[first:end].astype(np.int64))
        positions.append(places)
        slots.append(table[places // page_tokens] * page_tokens + places % page_tokens)
        if part.count > 1:
            past = torch.from_numpy(table[: -(-first // page_tokens)].copy()).to(device)
            spans.append(Span(row, part.count, first, past))
        starts.append(row)
        row += part.count
    places = np.concatenate(positions)
    return StepBatch(
        parts=ordered,
        starts=tuple(starts),
        token_ids=torch.from_numpy(np.concatenate(ids)).to(device),
        positions=torch.from_numpy(places).to(device),
        slots=torch.from_numpy(np.concatenate(slots)).to(device),
        highest_position=int(places.max()),
        groups=tuple(_groups([part for part in ordered if part.count == 1], page_tokens, device)),
        spans=tuple(spans),
    )


def _table(part: Part) -> np.ndarray:
    assert part.sequence.table is not None
    return np.array(part.sequence.table.blocks, dtype=np.int64)


def _groups(parts: Sequence[Part], page_tokens: int, device: torch.device) -> list[RowGroup]:
    """Rows by length, so that padding to the longest of a group at most doubles what is read."""
    pages = [part.sequence.computed // page_tokens + 1 for part in parts]
    by_length = sorted(range(len(parts)), key=lambda row: pages[row])
    groups: list[list[int]] = []
    for row in by_length:
        if not groups or pages[row] > max(_LEAST_PAGES, _MAX_PADDING * pages[groups[-1][0]]):
            groups.append([])
        groups[-1].append(row)
    return [_group(rows, [parts[row] for row in rows], pages[rows[-1]], device) for rows in groups]


def _group(rows: list[int], parts: Sequence[Part], pages: int, device: torch.device) -> RowGroup:
    blocks = np.empty((len(rows), pages), dtype=np.int64)
    for line, part in zip(blocks, parts, strict=True):
        table = _table(part)[:pages]
        line[: len(table)] = table
        line[len(table) :] = table[0]  # masked, but never another prompt's
    lengths = [part.sequence.computed + 1 for part in parts]
    return RowGroup(
        torch.tensor(rows, device=device),
        torch.from_numpy(blocks).to(device),
        torch.tensor(lengths, device=device),
    )
