"""Owns the tokens that a draw may still choose: scaling by temperature, then min_p, top_k and top_p, in vLLM's order.

Tokens are ranked by logit, equal ones by id; top_p keeps the shortest beginning of that ranking whose mass reaches its share.
Only the first `depth` of a row are looked at, and each row says whether that was enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.protocol import Sampling


@dataclass(frozen=True, slots=True)
class Truncation:
    """One row per draw, [n, 1]. Off: top_k = vocab, top_p = inf, log_min_p = -inf. peak: the row's highest logit."""

    peak: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    log_min_p: torch.Tensor

    @classmethod
    def of(cls, peak: torch.Tensor, samplings: Sequence[Sampling], vocab: int) -> Truncation:
        columns = torch.tensor(
            [
                (
                    sampling.temperature,
                    sampling.top_k if 0 < sampling.top_k < vocab else vocab,
                    sampling.top_p if sampling.top_p < 1 else math.inf,
                    math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf,
                )
                for sampling in samplings
            ],
            dtype=torch.float64,
        ).to(peak.device)
        temperature, top_k, top_p, log_min_p = columns.unsqueeze(2).unbind(1)
        return cls(peak.double().unsqueeze(1), temperature, top_k, top_p, log_min_p)

    def is_off(self, vocab: int) -> bool:
        """Whether every token of every row may be drawn."""
        return bool(((self.top_k >= vocab) & (self.top_p == math.inf) & (self.log_min_p == -math.inf)).all())

    def rows(self, rows: torch.Tensor) -> Truncation:
        return Truncation(
            self.peak[rows], self.temperature[rows], self.top_k[rows], self.top_p[rows], self.log_min_p[rows]
        )

    def scaled(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits over temperature, float64, shifted so that a row's highest is 0: no temperature overflows."""
        return logits.double().sub_(self.peak).div_(self.temperature)


@dataclass(frozen=True, slots=True)
class Candidates:
    """token_ids, scaled, kept: [n, depth]; scaled as `Truncation.scaled`, where not kept of no meaning.

    settled: every token that may be drawn is among the kept. open: all kept ones may be drawn, and those at or below `floor` (a
    logit, [n, 1]) too, as far as min_p lets them and the mass ranked before them stays under `goal`. Neither: look deeper.
    """

    token_ids: torch.Tensor
    scaled: torch.Tensor
    kept: torch.Tensor
    settled: torch.Tensor
    open: torch.Tensor
    floor: torch.Tensor
    goal: torch.Tensor


def candidates_of(logits: torch.Tensor, truncation: Truncation, depth: int) -> Candidates:
    """The first `depth` tokens of each row of `logits` [n, vocab], truncated."""
    values, token_ids = _ranked(logits, depth)
    whole = depth >= logits.shape[1]
    floor = torch.full_like(values[:, :1], -math.inf) if whole else values[:, -1:]
    scaled = truncation.scaled(values)
    complete = values > floor  # of the tokens equal to the floor, some may lie beyond the depth
    rank = torch.arange(values.shape[1], device=logits.device)
    kept = complete & (rank < truncation.top_k) & (scaled >= truncation.log_min_p)
    beyond = truncation.scaled(floor) >= truncation.log_min_p.clamp(min=-1e300)  # tokens beyond the depth pass min_p
    settled = ~beyond | (truncation.top_k <= complete.sum(1, keepdim=True))
    unlimited = truncation.top_k >= logits.shape[1]
    tail_mass = _tail_mass(logits, truncation, floor, ~settled & unlimited)
    reach = scaled.exp().mul_(kept).cumsum(1)
    goal = truncation.top_p * (reach[:, -1:] + tail_mass)
    kept &= torch.cat((torch.zeros_like(goal), reach[:, :-1]), dim=1) < goal
    settled |= unlimited & (reach[:, -1:] >= goal)
    return Candidates(token_ids, scaled, kept, settled.squeeze(1), (unlimited & ~settled).squeeze(1), floor, goal)


def _ranked(logits: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    if depth >= logits.shape[1]:
        return torch.sort(logits, dim=1, descending=True, stable=True)
    token_ids = torch.topk(logits, depth, dim=1, sorted=False).indices.sort(dim=1).values
    values, order = torch.sort(logits.gather(1, token_ids), dim=1, descending=True, stable=True)
    return values, token_ids.gather(1, order)


def _tail_mass(logits: torch.Tensor, truncation: Truncation, floor: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mass, against the peak's 1, of the tokens at or below `floor` that pass min_p; 0 where not wanted. [n, 1]"""
    mass = torch.zeros_like(truncation.peak)
    rows = (wanted & (truncation.top_p < math.inf)).squeeze(1).nonzero().squeeze(1)
    if len(rows):
        part, limits = (logits, truncation) if len(rows) == len(logits) else (logits[rows], truncation.rows(rows))
        scaled = limits.scaled(part)
        scaled.masked_fill_((part > floor[rows]) | (scaled < limits.log_min_p), -math.inf)
        mass[rows] = scaled.exp_().sum(1, keepdim=True)
    return mass
