"""Owns rotary position embeddings (plain RoPE): a table of cosines and sines, and the rotation of heads."""

from __future__ import annotations

import torch

_FIRST_ROWS = 1024


class RotaryTable:
    """cos and sin of position * theta^(-2i/dim), float32 as in transformers, rounded to the compute dtype. Grows by doubling."""

    def __init__(self, theta: float, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self._frequencies = 1.0 / (theta**exponents)
        self._dtype = dtype
        self._device = device
        self._cos_sin = self._table(_FIRST_ROWS)

    def rows(self, positions: torch.Tensor, highest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [n, 1, head_dim / 2], for int64 `positions` [n], none above `highest`."""
        if highest >= len(self._cos_sin):
            self._cos_sin = self._table(1 << highest.bit_length())
        cos, sin = self._cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
        return cos, sin

    def _table(self, rows: int) -> torch.Tensor:
        angles = torch.arange(rows, dtype=torch.float32).unsqueeze(1) * self._frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1).to(self._dtype).to(self._device)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates `heads` [n, heads, head_dim] by halves (first with second), as Llama checkpoints are laid out."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
