"""Owns rotary position embeddings: the frequencies of each kind of RoPE, a table of cosines and sines, the rotation of heads.

The formulas keep the order of operations of transformers, so that the frequencies are its own to the last bit.
"""

from __future__ import annotations

import math
from typing import assert_never

import torch

from engine.model_spec import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

_FIRST_ROWS = 1024


def frequencies(theta: float, head_dim: int, scaling: RopeScaling | None) -> torch.Tensor:
    """Radians per token of each pair of dimensions, [head_dim / 2] float32."""
    periods = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    match scaling:
        case None:
            return 1.0 / periods
        case LinearScaling(factor):
            return 1.0 / periods / factor
        case Llama3Scaling():
            return _llama3(1.0 / periods, scaling)
        case YarnScaling():
            return _yarn(periods, theta, scaling)
    assert_never(scaling)


def _llama3(plain: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """As released with Llama 3.1. Wavelengths are in tokens."""
    factor, low, high = scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / plain
    is_low = wavelengths > scaling.original_tokens / low
    is_high = wavelengths < scaling.original_tokens / high
    smooth = (scaling.original_tokens / wavelengths - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    return torch.where(is_low, plain / factor, torch.where(is_high, plain, between))


def _yarn(periods: torch.Tensor, theta: float, scaling: YarnScaling) -> torch.Tensor:
    """YaRN, section 3.2 ("NTK-by-parts"): dimensions that turn often are kept, those that turn seldom are stretched."""
    head_dim = 2 * len(periods)

    def dimension(turns: float) -> float:
        """Where a pair turns `turns` times within the original context."""
        return (head_dim * math.log(scaling.original_tokens / (turns * 2 * math.pi))) / (2 * math.log(theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # as transformers does, against a division by zero
    kept = 1 - torch.clamp((torch.arange(len(periods), dtype=torch.float32) - first) / (last - first), 0, 1)
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept


class RotaryTable:
    """cos and sin of position * frequency, float32 as in transformers, rounded to the compute dtype. Grows by doubling."""

    def __init__(
        self, theta: float, head_dim: int, scaling: RopeScaling | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._frequencies = frequencies(theta, head_dim, scaling)
        self._magnitude = scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0
        self._dtype = dtype
        self._device = device
        self._cos_sin = self._table(_FIRST_ROWS)

    def rows(self, positions: torch.Tensor, highest: int) -> torch.Tensor:
        """[n, head_dim], cosines and then sines, for int64 `positions` [n], none above `highest`."""
        if highest >= len(self._cos_sin):
            self._cos_sin = self._table(1 << highest.bit_length())
        return self._cos_sin.index_select(0, positions)

    def _table(self, rows: int) -> torch.Tensor:
        angles = torch.arange(rows, dtype=torch.float32).unsqueeze(1) * self._frequencies
        table = torch.cat([angles.cos(), angles.sin()], dim=-1) * self._magnitude
        return table.to(self._dtype).to(self._device)
