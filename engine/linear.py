"""Owns the linear layers: weight and bias on the compute device, of torch or packed for the kernels where these compute."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional as F

from engine.kernels.library import Kernels


class Linear(Protocol):
    """y = x W^T + b. x: [n, in] -> [n, out]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def onto(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual + y, [n, out]; `residual` stays what it is."""


class Gated(Protocol):
    """silu(x G^T + g) * (x U^T + u). x: [n, in] -> [n, out]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class TorchLinear:
    """weight: [out, in]."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)

    def onto(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return residual + self(x)


class TorchGated:
    """gate_up: [2 * out, in], the gate's rows first."""

    __slots__ = ("_gate_up",)

    def __init__(self, gate_up: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._gate_up = TorchLinear(gate_up, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return F.silu(gate) * up


class KernelLinear:
    """weight: [out, in]. Computes in float32, over weights of the dtype they are stored in."""

    __slots__ = ("_kernels", "_weights")

    def __init__(self, kernels: Kernels, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._kernels = kernels
        self._weights = kernels.pack(weight, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.linear(x, self._weights)

    def onto(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.linear_onto(residual, x, self._weights)


class KernelGated:
    """gate_up: [2 * out, in], the gate's rows first. The product of both never reaches memory."""

    __slots__ = ("_kernels", "_weights")

    def __init__(self, kernels: Kernels, gate_up: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._kernels = kernels
        self._weights = kernels.pack_gated(gate_up, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.gated(x, self._weights)
