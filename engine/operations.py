"""Owns the operations of a decoder between its attention: projections, norms, rotation; with torch or with the kernels."""

from __future__ import annotations

from typing import Protocol

import torch

from engine.kernels.library import Kernels
from engine.linear import Gated, KernelGated, KernelLinear, Linear, TorchGated, TorchLinear


class Operations(Protocol):
    """Contract: tests/engine/test_operations.py. `dtype`: of all activations."""

    @property
    def dtype(self) -> torch.dtype: ...

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """weight: [out, in], in the dtype that is stored; bias: [out]."""

    def gated(self, gate_up: torch.Tensor, bias: torch.Tensor | None) -> Gated:
        """gate_up: [2 * out, in], the gate's rows first, in the dtype that is stored; bias: [2 * out]."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMS norm over the last dimension. x: [n, count] or [n, heads, count]; weight: [count] or [heads, count]."""

    def rotate(self, heads: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
        """Rotates [n, heads, head_dim] by halves, perhaps in place. cos_sin: [n, head_dim], cosines and then sines."""


class TorchOperations:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return TorchLinear(weight, bias)

    def gated(self, gate_up: torch.Tensor, bias: torch.Tensor | None) -> Gated:
        return TorchGated(gate_up, bias)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / rms(x) in float32, rounded before the weight is applied: the order that checkpoints were trained with."""
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    def rotate(self, heads: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
        cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
        first, second = heads.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class KernelOperations:
    """Activations are float32, whatever dtype weights and KV are stored in; some kernels round them where they meet bfloat16."""

    dtype = torch.float32

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return KernelLinear(self._kernels, weight, bias)

    def gated(self, gate_up: torch.Tensor, bias: torch.Tensor | None) -> Gated:
        return KernelGated(self._kernels, gate_up, bias)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._kernels.norm(x, weight, eps)

    def rotate(self, heads: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
        self._kernels.rotate(heads, cos_sin)
        return heads
