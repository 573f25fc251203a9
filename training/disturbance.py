"""Owns the disturbed windows of the settling phase: text to be predicted behind a wrong beginning and wrong tokens.

A model that knows its text by heart writes nonsense behind a prompt that it does not know: nothing in training looked
like its own slips. Windows with foreign beginnings and some foreign tokens teach it to find back to text it knows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # a target that `torch.nn.functional.cross_entropy` leaves out


@dataclass(frozen=True, slots=True)
class Disturbance:
    """`spliced` of the rows begin with `shortest` to `longest` tokens of another row; `replaced` of all tokens change."""

    spliced: float = 0.5
    shortest: int = 2
    longest: int = 48
    replaced: float = 0.04


def disturbed(windows: Tensor, disturbance: Disturbance, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (rows, length) of windows (rows, length + 1); what nothing foretells is no target."""
    inputs, targets = windows[:, :-1].clone(), windows[:, 1:].clone()
    rows, length = inputs.shape
    foreign = inputs.flatten()[torch.randint(inputs.numel(), (rows, length), generator=generator)]
    swapped = torch.rand(rows, length, generator=generator) < disturbance.replaced
    lengths = torch.randint(disturbance.shortest, disturbance.longest + 1, (rows, 1), generator=generator)
    lengths *= torch.rand(rows, 1, generator=generator) < disturbance.spliced
    beginning = torch.arange(length) < lengths
    others = inputs.roll(1, dims=0)
    inputs = torch.where(swapped, foreign, inputs)
    return torch.where(beginning, others, inputs), torch.where(beginning, IGNORED, targets)
