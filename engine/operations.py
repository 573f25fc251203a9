"""Owns the operations of a decoder between its attention: projections, norms, gates, rotation; with torch or with the kernels."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional as F

from engine.kernels.library import Kernels
from engine.linear import Linear


class Operations(Protocol):
    """Contract: tests/engine/test_operations.py. `dtype`: of all activations."""

    @property
    def dtype(self) -> torch.dtype: ...

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """weight: [out, in], in the dtype that is stored; bias: [out]."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMS norm over the last dimension. x: [n, count] or [n, heads, count]; weight: [count] or [heads, count]."""

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu of the first half of the columns times the second half."""

    def rotate(self, heads: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
        """Rotates [n, heads, head_dim] by halves, perhaps in place. cos_sin: [n, head_dim], cosines and then sines."""


class TorchOperations:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return Linear(weight, bias, None)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / rms(x) in float32, rounded before the weight is applied: the order that checkpoints were trained with."""
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def rotate(self, heads: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
        cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
        first, second = heads.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class KernelOperations:
    """Activations stay float32, whatever dtype weights and KV are stored in."""

    dtype = torch.float32

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return Linear(weight, bias, self._kernels)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._kernels.norm(x, weight, eps)

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._kernels.gate(gate_up)

    def rotate(self, heads: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
        self._kernels.rotate(heads, cos_sin)
        return heads
