"""Owns the tensors of one step: which row of the batch is which token of which sequence, and where its KV goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.schedule import Part


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All parts of a step in one batch of n rows; the single-token parts come first."""

    parts: tuple[Part, ...]
    starts: tuple[int, ...]  # first row of each part
    token_ids: torch.Tensor  # int64 [n]
    positions: torch.Tensor  # int64 [n]
    slots: torch.Tensor  # int64 [n]: block * page_tokens + offset
    highest_position: int

    def last_row(self, ordinal: int) -> int:
        return self.starts[ordinal] + self.parts[ordinal].count - 1


def build(parts: Sequence[Part], page_tokens: int, device: torch.device) -> StepBatch:
    """Every sequence of `parts` holds a table with room for its tokens."""
    ordered = tuple(sorted(parts, key=lambda part: part.count > 1))  # stable
    starts: list[int] = []
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    row = 0
    for part in ordered:
        first, end = part.sequence.computed, part.sequence.computed + part.count
        places = np.arange(first, end, dtype=np.int64)
        ids.append(np.frombuffer(part.sequence.tokens, dtype=np.int32)[first:end].astype(np.int64))
        positions.append(places)
        slots.append(block_ids(part)[places // page_tokens].astype(np.int64) * page_tokens + places % page_tokens)
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
    )


def block_ids(part: Part) -> np.ndarray:
    """int32 [pages], a copy: the table grows while views of it would forbid that."""
    assert part.sequence.table is not None
    return np.array(part.sequence.table.blocks, dtype=np.int32)
