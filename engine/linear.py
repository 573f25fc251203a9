"""Owns one linear projection: weight and bias on the compute device, packed for the kernels where they compute."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from engine.kernels.library import Kernels


class Linear:
    """y = x W^T + b. weight: [out, in]. The kernels compute in float32, over weights of the dtype they are stored in."""

    __slots__ = ("_bias", "_columns", "_kernels", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, kernels: Kernels | None) -> None:
        self._kernels = kernels
        self._columns = len(weight)
        self._weight = weight if kernels is None else kernels.pack(weight)
        self._bias = bias if kernels is None or bias is None else bias.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._kernels is None:
            return F.linear(x, self._weight, self._bias)
        return self._kernels.linear(x, self._weight, self._bias, self._columns)
