"""The optimiser: Muon for the hidden matrices, AdamW for embeddings and norms, both in float32.

`torch.optim.Muon` orthogonalises in bfloat16, which is slow on a CPU without bfloat16 instructions, and one matrix at a
time; here equal shapes share one batched product.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from training.network import Weights

NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
MUON_MOMENTUM = 0.95
ADAM_BETAS = (0.9, 0.95)
ADAM_EPSILON = 1e-10


@dataclass(frozen=True, slots=True)
class LearningRates:
    """Peak rates; weight decay is decoupled and scaled by the rate."""

    matrices: float = 0.025
    embeddings: float = 8e-3
    weight_decay: float = 0.02

    def scaled(self, factor: float) -> "LearningRates":
        return LearningRates(self.matrices * factor, self.embeddings * factor, self.weight_decay)


@dataclass(slots=True)
class Moments:
    """The optimiser's memory: Muon momenta of the matrices, both Adam moments of everything else."""

    first: Weights = field(default_factory=dict)
    second: Weights = field(default_factory=dict)


def initial_moments(weights: Weights) -> Moments:
    return Moments(
        first={name: torch.zeros_like(w) for name, w in weights.items()},
        second={name: torch.zeros_like(w) for name, w in weights.items() if not _is_matrix(name)},
    )


def _is_matrix(name: str) -> bool:
    return "_proj" in name


@torch.no_grad()
def apply_gradients(weights: Weights, moments: Moments, rates: LearningRates, step: int) -> None:
    """Update the weights in place from their `.grad`, which is cleared; `step` counts from 1."""
    by_shape: dict[tuple[int, int], list[str]] = {}
    for name, weight in weights.items():
        if _is_matrix(name):
            rows, columns = weight.shape
            by_shape.setdefault((min(rows, columns), max(rows, columns)), []).append(name)
        else:
            _adam(name, weight, moments, rates, step)
    for names in by_shape.values():
        _muon(names, weights, moments, rates)
    for weight in weights.values():
        weight.grad = None


def _adam(name: str, weight: Tensor, moments: Moments, rates: LearningRates, step: int) -> None:
    gradient = _gradient(weight)
    first, second = moments.first[name], moments.second[name]
    first.lerp_(gradient, 1 - ADAM_BETAS[0])
    second.lerp_(gradient.square(), 1 - ADAM_BETAS[1])
    scale = (second / (1 - ADAM_BETAS[1] ** step)).sqrt_().add_(ADAM_EPSILON)
    weight.addcdiv_(first, scale, value=-rates.embeddings / (1 - ADAM_BETAS[0] ** step))


def _muon(names: list[str], weights: Weights, moments: Moments, rates: LearningRates) -> None:
    directions = []
    for name in names:
        gradient, momentum = _gradient(weights[name]), moments.first[name]
        momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
        direction = gradient.lerp(momentum, MUON_MOMENTUM)
        directions.append(direction if direction.shape[0] <= direction.shape[1] else direction.T)
    for name, update in zip(names, orthogonalised(torch.stack(directions)), strict=True):
        weight = weights[name]
        rows, columns = weight.shape
        weight.mul_(1 - rates.matrices * rates.weight_decay)
        weight.add_(update if rows <= columns else update.T, alpha=-rates.matrices * max(1.0, rows / columns) ** 0.5)


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return matrices (n, rows <= columns, columns) with their singular values moved near 1.

    Quintic Newton-Schulz iteration of Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers").
    """
    a, b, c = NEWTON_SCHULZ
    x: Tensor = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
