"""Owns the choice of the tokens that a blend of chunks computes anew: by deviation (CacheBlend) or by place (EPIC). Pure.

Algorithm card 3, after CacheBlend (EuroSys'25) and EPIC (2024). Fresh tokens, those of no chunk, are always chosen and never
compete; so is the last token of the prompt, whose logits are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pdserve.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Blend:
    """CacheBlend. `ratio`: share of the chunks' tokens computed anew, weighted by what a layer of them costs. `filtering`: from 0,
    one set for all layers, to 1: the share falls evenly from layer 1 on, as far around `ratio` as (1 + filtering)."""

    ratio: float
    filtering: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1 or not 0 <= self.filtering <= 1:
            raise InvalidRequest("The ratio and the filtering of a blend must lie in 0 .. 1.", param="blend")


@dataclass(frozen=True, slots=True)
class Epic:
    """EPIC: the first `first_tokens` tokens of every chunk. A chunk at position 0 is exact as it is. 0: naive reuse."""

    first_tokens: int

    def __post_init__(self) -> None:
        if self.first_tokens < 0:
            raise InvalidRequest("The first tokens of a chunk cannot be fewer than 0.", param="blend")


Recipe = Blend | Epic


@dataclass(frozen=True, slots=True)
class Span:
    """A chunk's tokens in the prompt: positions [start, start + tokens)."""

    start: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Which row is which: row i is the token at position past + i. On the host."""

    chunk_rows: torch.Tensor  # int64 [c], ascending: rows of chunks; c counts the tokens of all chunks
    ordinals: torch.Tensor  # int64 [n]: place of a row among chunk_rows; -1 where it is fresh
    fresh: torch.Tensor  # bool [n]: always computed
    heads: torch.Tensor  # int64 [n]: how many tokens of its chunk come before it, where the chunk is not exact as it is

    @property
    def competing(self) -> int:
        """Tokens that may be taken from chunks."""
        return int((~self.fresh).sum())


@dataclass(frozen=True, slots=True)
class Selection:
    """`first`: the rows that are computed in layer 0. `kept`: per layer, how many rows stay after its deviations; None: all."""

    first: torch.Tensor
    kept: tuple[int | None, ...]


def lay_out(past: int, total: int, spans: Sequence[Span]) -> Layout:
    """Raises InvalidRequest where chunks overlap, lie outside [past, total), or are not in order."""
    rows, end = total - past, past
    if rows < 1:
        raise InvalidRequest("A blend needs at least one token to compute.")
    fresh, heads = torch.ones(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.int64)
    for span in spans:
        if span.start < end or span.tokens < 1 or span.start + span.tokens > total:
            raise InvalidRequest("Chunks must lie one after the other inside the prompt.", param="chunks")
        end = span.start + span.tokens
        fresh[span.start - past : end - past] = False
        heads[span.start - past : end - past] = torch.arange(span.tokens) if span.start else total
    chunk_rows = (~fresh).nonzero()[:, 0]
    ordinals = torch.full((rows,), -1)
    ordinals[chunk_rows] = torch.arange(len(chunk_rows))
    fresh[-1] = True
    return Layout(chunk_rows, ordinals, fresh, heads)


def plan_selection(recipe: Recipe, layers: int, layout: Layout) -> Selection:
    match recipe:
        case Epic(first_tokens):
            chosen = layout.fresh | (layout.heads < first_tokens)
            return Selection(chosen.nonzero()[:, 0], (None,) * layers)
        case Blend():
            competing, always = layout.competing, len(layout.fresh) - layout.competing
            kept, before = list[int | None]([None] * layers), -1
            for layer, share in enumerate(shares(recipe, layers), start=1):
                count = always + math.ceil(share * competing - 1e-6)  # 0.15 * 100 is 15, whatever the rounding
                kept[layer] = count if count != before else None
                before = count
            return Selection(torch.arange(len(layout.fresh)), tuple(kept))


def shares(recipe: Blend, layers: int) -> list[float]:
    """Share of chunk tokens that flow on from each of the layers 1 .. layers - 2; their mean is the ratio.

    Rows that stay after the deviations of a layer cost the rest of that layer and the projections of the next: one layer, whichever.
    In the last layer only the last token flows on.
    """
    count = layers - 2
    if count <= 0:
        return []
    spread = min(recipe.filtering, 1 / recipe.ratio - 1) if recipe.ratio and count > 1 else 0.0
    return [recipe.ratio * (1 + spread - 2 * spread * step / max(count - 1, 1)) for step in range(count)]


def computed_share(recipe: Recipe, layers: int, total: int, chunk_tokens: Sequence[int]) -> float:
    """How much of a whole prefill of `total` tokens the blend computes: rows times layers, attention left out."""
    chunked = sum(chunk_tokens)
    fresh = total - chunked
    match recipe:
        case Epic(first_tokens):
            return (fresh + sum(min(first_tokens, tokens) for tokens in chunk_tokens)) / total
        case Blend():
            whole = min(2, layers)
            return (whole * total + (layers - whole) * fresh + sum(shares(recipe, layers)) * chunked) / (layers * total)


def deviations(computed: tuple[torch.Tensor, torch.Tensor], taken: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """How far the KV of a chunk lies from the exact one: |dV|^2 / |V|^2 + |dK|^2 / |K|^2 per row, float32 [n].

    Each pair: key before rotation and value [n, kv_heads, head_dim]. Keys of one rotation only can be compared.
    """
    total = torch.zeros(len(computed[0]), device=computed[0].device)
    for exact, given in zip(computed, taken, strict=True):
        wide = exact.float()
        total += (wide - given.float()).square_().sum((1, 2)) / wide.square().sum((1, 2)).clamp_(min=1e-30)
    return total


def keep(deviation: torch.Tensor, always: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers of the `count` rows that deviate most, ascending; `always` (bool) goes before all. Equal ones: the earlier rows."""
    ranked = deviation.masked_fill(always, float("inf")).sort(descending=True, stable=True).indices
    return ranked[:count].sort().values
