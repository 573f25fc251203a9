"""Owns the feed-forward of a layer: one gated unit, or many of them (experts) of which a router picks a few per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F

from engine.linear import Gated, Linear


class FeedForward(Protocol):
    """hidden [n, hidden], normalised -> what it makes of it, added to the residual stream [n, hidden]."""

    def onto(self, residual: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class GatedUnit:
    """down(silu(gate) * up)."""

    gate_up: Gated
    down: Linear

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(self.gate_up(hidden))

    def onto(self, residual: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.down.onto(residual, self.gate_up(hidden))


@dataclass(frozen=True, slots=True)
class Experts:
    """Qwen3-MoE: softmax over all experts, the `per_token` best of them, their outputs weighted and added."""

    router: Linear
    units: tuple[GatedUnit, ...]
    per_token: int
    normalised: bool  # the weights of the chosen experts add up to 1

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Groups the tokens by expert, so that every expert with any token is one pair of products.

        A token's experts are added in the order of their numbers whoever shares its batch, and no two rows of one
        addition are the same token: the sum does not depend on the batch, nor on the order of atomic additions.
        """
        weights, chosen = self.route(hidden)
        sorted_experts, order = chosen.flatten().sort(stable=True)
        tokens = order.div(self.per_token, rounding_mode="floor")
        sorted_weights = weights.flatten().index_select(0, order).unsqueeze(1)
        # The shapes of the products depend on the routing: a device is waited for here, once per layer.
        counts: list[int] = sorted_experts.bincount(minlength=len(self.units)).tolist()
        output, start = torch.zeros_like(hidden), 0
        for unit, count in zip(self.units, counts, strict=True):
            if count:
                part = slice(start, start + count)
                rows = tokens[part]
                output.index_add_(0, rows, unit(hidden.index_select(0, rows)) * sorted_weights[part])
                start += count
        return output

    def onto(self, residual: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return residual + self(hidden)

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights in the compute dtype and numbers of the chosen experts, each [n, per_token]. The softmax is float32."""
        probabilities = F.softmax(self.router(hidden), dim=-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.per_token, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(hidden.dtype), chosen
