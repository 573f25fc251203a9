"""The contract of engine.scattered_attention.ScatteredAttention: both implementations against float64."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from engine.kernels.library import Kernels, load_kernels
from engine.scattered_attention import ScatteredAttention, open_scattered

PAGE, KV_HEADS, GROUP, DIM, LAYERS = 16, 2, 3, 32, 2
WINDOWS = (0, 70)
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def kernels_of(name: str) -> Kernels | None:
    return load_kernels() if name == "kernels" else None


class Case:
    """A prompt's KV, scattered over a pool that holds NaN elsewhere, and rows of it."""

    def __init__(self, seed: int, total: int, rows: int, dtype: torch.dtype = torch.float32) -> None:
        source = random.Random(seed)
        torch.manual_seed(seed)
        pages = -(-total // PAGE)
        self.blocks = np.array(source.sample(range(pages + 9), pages), dtype=np.int32)
        self.key, self.value = (torch.randn(LAYERS, total, KV_HEADS, DIM).to(dtype).float() for _ in range(2))
        self.positions = torch.tensor(sorted(source.sample(range(total), rows)))
        self.query = torch.randn(rows, KV_HEADS * GROUP, DIM)
        self.pool = torch.full((LAYERS, pages + 9, 2, PAGE, KV_HEADS, DIM), float("nan")).to(dtype)

    def open(self, kernels: Kernels | None) -> ScatteredAttention:
        attention = open_scattered(self.pool, kernels, WINDOWS)
        everything = attention.rows(self.blocks, torch.arange(self.key.shape[1]))
        for layer in range(LAYERS):
            everything.write(layer, self.key[layer], self.value[layer])
        return attention

    def exact(self, layer: int, rows: Sequence[int]) -> torch.Tensor:
        """float64."""
        found = []
        for row in rows:
            end = int(self.positions[row]) + 1
            begin = max(0, end - WINDOWS[layer]) if WINDOWS[layer] else 0
            key, value = (x[layer, begin:end].double().repeat_interleave(GROUP, 1) for x in (self.key, self.value))
            scores = torch.einsum("hd,thd->ht", self.query[row].double(), key) * DIM**-0.5
            found.append(torch.einsum("ht,thd->hd", scores.softmax(-1), value))
        return torch.stack(found)


@pytest.mark.parametrize("name", ["kernels", "torch"])
@pytest.mark.parametrize("layer", range(LAYERS), ids=["all", "window"])
@pytest.mark.parametrize(
    ("total", "rows"), [(1, 1), (17, 17), (900, 1), (2000, 3), (1700, 16), (1700, 17), (1700, 400), (800, 800)]
)
def test_each_row_sees_what_comes_before_it_and_nothing_else(name: str, layer: int, total: int, rows: int) -> None:
    case = Case(total + rows, total, rows)
    access = case.open(kernels_of(name)).rows(case.blocks, case.positions)
    got = access.attend(layer, case.query).double()
    torch.testing.assert_close(got, case.exact(layer, range(rows)), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["kernels", "torch"])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_a_later_write_to_some_rows_replaces_what_lay_there(name: str, dtype: torch.dtype) -> None:
    case = Case(5, 300, 90, dtype)
    access = case.open(kernels_of(name)).rows(case.blocks, case.positions)
    case.key[0, case.positions], case.value[0, case.positions] = torch.randn(2, 90, KV_HEADS, DIM).to(dtype).float()
    access.write(0, case.key[0, case.positions], case.value[0, case.positions])
    wanted = case.exact(0, range(90))
    torch.testing.assert_close(access.attend(0, case.query).double(), wanted, atol=2e-5, rtol=2e-5)


def test_with_the_kernels_the_other_rows_change_no_bit() -> None:
    case = Case(8, 1700, 300)
    attention = case.open(kernels_of("kernels"))
    together = attention.rows(case.blocks, case.positions).attend(0, case.query)
    for rows in (slice(0, 1), slice(299, 300), slice(7, 20), slice(100, 300)):
        alone = attention.rows(case.blocks, case.positions[rows]).attend(0, case.query[rows])
        assert torch.equal(alone, together[rows])
