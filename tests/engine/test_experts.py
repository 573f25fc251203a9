"""Experts against the plain sum over every expert in float64, and what a token owes to those it shares a batch with: nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from engine.experts import Experts, GatedUnit
from engine.operations import TorchOperations

HIDDEN, WIDE, COUNT = 24, 40, 8


@dataclass(frozen=True, slots=True)
class Case:
    """The same weights twice: grouped for serving, and as they are."""

    experts: Experts
    router: torch.Tensor
    units: list[tuple[torch.Tensor, torch.Tensor]]  # gate_up, down

    def plain_sum(self, hidden: torch.Tensor) -> torch.Tensor:
        """Every expert for every token in float64, those that were not chosen with weight 0."""
        wide = hidden.double()
        probabilities = (wide @ self.router.double().T).softmax(-1)
        least = probabilities.topk(self.experts.per_token, dim=-1).values[:, -1:]
        weights = torch.where(probabilities >= least, probabilities, 0.0)
        if self.experts.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        total = torch.zeros_like(wide)
        for number, (gate_up, down) in enumerate(self.units):
            gate, up = (wide @ gate_up.double().T).chunk(2, dim=-1)
            total += weights[:, number, None] * ((F.silu(gate) * up) @ down.double().T)
        return total


def case(per_token: int, *, normalised: bool, dtype: torch.dtype = torch.float32) -> Case:
    source = torch.Generator().manual_seed(5)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=source) * 0.3).to(dtype)

    torch_ops = TorchOperations(dtype)
    router = weight(COUNT, HIDDEN)
    pairs = [(weight(2 * WIDE, HIDDEN), weight(HIDDEN, WIDE)) for _ in range(COUNT)]
    units = tuple(GatedUnit(torch_ops.gated(gate_up, None), torch_ops.linear(down, None)) for gate_up, down in pairs)
    return Case(Experts(torch_ops.linear(router, None), units, per_token, normalised), router, pairs)


def tokens(count: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("count", [1, 2, 7, 300])
@pytest.mark.parametrize("per_token", [1, 2, COUNT])
@pytest.mark.parametrize("normalised", [False, True])
def test_grouped_experts_are_the_weighted_sum_of_the_chosen_ones(count: int, per_token: int, normalised: bool) -> None:
    checked, hidden = case(per_token, normalised=normalised), tokens(count)
    torch.testing.assert_close(checked.experts(hidden).double(), checked.plain_sum(hidden), atol=1e-5, rtol=1e-5)


def test_all_tokens_may_choose_the_same_expert() -> None:
    mixture = case(1, normalised=True).experts
    hidden = tokens(1).expand(50, -1)
    chosen = {int(expert) for expert in mixture.route(hidden)[1].flatten()}
    assert len(chosen) == 1
    torch.testing.assert_close(mixture(hidden), mixture.units[chosen.pop()](hidden))


def test_a_token_goes_to_the_same_experts_with_the_same_weights_in_any_order_of_the_batch() -> None:
    mixture = case(2, normalised=False).experts
    hidden = tokens(64)
    torch.testing.assert_close(mixture(hidden.flip(0)).flip(0), mixture(hidden), atol=1e-6, rtol=1e-6)


def test_weights_are_computed_in_float32_and_rounded_once() -> None:
    mixture = case(2, normalised=True, dtype=torch.bfloat16).experts
    hidden = tokens(16).bfloat16()
    weights, _ = mixture.route(hidden)
    best = mixture.router(hidden).softmax(-1, dtype=torch.float32).topk(2).values
    assert torch.equal(weights, (best / best.sum(-1, keepdim=True)).bfloat16())
