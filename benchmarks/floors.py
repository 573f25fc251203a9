"""Owns the floors under an engine's step: what its matrix products alone cost, and what reading its bytes once costs.

Both are measured, as contenders beside the engines: a floor taken on a quiet machine says nothing about a busy one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from benchmarks.random_model import LlamaShape

Linear = Callable[[torch.Tensor], torch.Tensor]
Prepare = Callable[[torch.Tensor, int], Linear]

_READ_COLUMNS = 4096


def bare_linear(weight: torch.Tensor, rows: int) -> Linear:
    """weight: [out, in]."""
    return lambda x: F.linear(x, weight)


def prepacked_linear(weight: torch.Tensor, rows: int) -> Linear:
    """oneDNN's blocked layout of `weight` for inputs of `rows` rows. Private operators of torch: see `has_prepacking`."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    pointwise = torch.ops.mkldnn._linear_pointwise

    def product(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = pointwise(x, packed, None, "none", [], "")
        return y

    return product


def has_prepacking() -> bool:
    try:
        prepacked_linear(torch.ones(16, 16), 1)(torch.ones(1, 16))
    except (AttributeError, RuntimeError):
        return False
    return True


class GemmFloor:
    """A DecodeContender and PrefillContender: the linears of one step, all layers and the head, and nothing else.

    Q, K and V are one product, gate and up too: the cheapest form there is. Every layer has weights of its own, as caches see it.
    """

    def __init__(self, name: str, prepare: Prepare, shape: LlamaShape, dtype: torch.dtype) -> None:
        self.name = name
        self._prepare = prepare
        sizes = _linear_sizes(shape)
        self._layers = [
            torch.randn(size).mul_(size[1] ** -0.5).to(dtype) for _ in range(shape.layers) for size in sizes
        ]
        self._head = torch.randn(shape.vocab, shape.hidden).mul_(shape.hidden**-0.5).to(dtype)
        self._dtype = dtype
        self._products: list[tuple[Linear, torch.Tensor]] = []

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        self._set_rows(len(prompts), len(prompts))

    def steps_s(self, count: int) -> list[float]:
        return [self._step_s() for _ in range(count)]

    def end(self) -> None:
        self._products = []

    def prefill_s(self, prompt: Sequence[int]) -> float:
        self._set_rows(len(prompt), 1)
        elapsed_s = self._step_s()
        self.end()
        return elapsed_s

    def _set_rows(self, rows: int, head_rows: int) -> None:
        counted = [*((weight, rows) for weight in self._layers), (self._head, head_rows)]
        inputs = {
            (count, weight.shape[1]): torch.ones(count, weight.shape[1], dtype=self._dtype) for weight, count in counted
        }
        self._products = [(self._prepare(weight, count), inputs[count, weight.shape[1]]) for weight, count in counted]

    @torch.inference_mode()
    def _step_s(self) -> float:
        start_s = time.perf_counter()
        for product, x in self._products:
            product(x)
        return time.perf_counter() - start_s


class MemoryFloor:
    """A DecodeContender: reads as many bytes as the weights and the batch's KV have, once a step, as fast as torch reads."""

    name = "memory floor"

    def __init__(self, shape: LlamaShape, dtype: torch.dtype) -> None:
        element_bytes = dtype.itemsize
        self._weight_bytes = shape.parameters * element_bytes
        self._token_bytes = shape.kv_elements_per_token * element_bytes
        self._read = torch.ones(0, 0)
        self._ones = torch.ones(_READ_COLUMNS)

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        size_bytes = self._weight_bytes + sum(map(len, prompts)) * self._token_bytes
        self._read = torch.ones(-(-size_bytes // (4 * _READ_COLUMNS)), _READ_COLUMNS)

    @torch.inference_mode()
    def steps_s(self, count: int) -> list[float]:
        samples: list[float] = []
        for _ in range(count):
            start_s = time.perf_counter()
            torch.mv(self._read, self._ones)  # of sum, max, dot, copy and this, the fastest reader
            samples.append(time.perf_counter() - start_s)
        return samples

    def end(self) -> None:
        self._read = torch.ones(0, 0)


def _linear_sizes(shape: LlamaShape) -> tuple[tuple[int, int], ...]:
    """[out, in] of the products of one layer."""
    query = shape.heads * shape.head_dim
    return (
        (query + 2 * shape.kv_heads * shape.head_dim, shape.hidden),
        (shape.hidden, query),
        (2 * shape.intermediate, shape.hidden),
        (shape.hidden, shape.intermediate),
    )
