"""The floors: the shapes they multiply are the model's, and prepacked products equal the plain ones."""

from __future__ import annotations

import torch

from benchmarks.floors import GemmFloor, Linear, MemoryFloor, bare_linear, has_prepacking, prepacked_linear
from benchmarks.peers import common_prefix
from benchmarks.random_model import LlamaShape

SHAPE = LlamaShape(layers=2, hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=256, vocab=500)
PROMPTS = [[1, 2, 3]] * 4


def test_the_gemm_floor_multiplies_every_weight_that_is_not_a_norm() -> None:
    products: list[tuple[int, int]] = []

    def prepare(weight: torch.Tensor, rows: int) -> Linear:
        products.append((weight.numel(), rows))
        return bare_linear(weight, rows)

    floor = GemmFloor("floor", prepare, SHAPE, torch.float32)
    floor.begin(PROMPTS)
    norms = (2 * SHAPE.layers + 1) * SHAPE.hidden
    assert sum(size for size, _ in products) == SHAPE.parameters - norms
    assert {rows for _, rows in products} == {len(PROMPTS)}
    assert all(elapsed_s > 0 for elapsed_s in floor.steps_s(3))


def test_a_prefill_needs_the_head_for_one_row_only() -> None:
    rows: list[int] = []

    def prepare(weight: torch.Tensor, count: int) -> Linear:
        rows.append(count)
        return bare_linear(weight, count)

    GemmFloor("floor", prepare, SHAPE, torch.float32).prefill_s([1] * 50)
    assert rows == [50] * 4 * SHAPE.layers + [1]


def test_prepacked_products_equal_plain_ones_where_torch_has_them() -> None:
    weight, x = torch.randn(48, 32), torch.randn(5, 32)
    product = prepacked_linear if has_prepacking() else bare_linear
    torch.testing.assert_close(product(weight, 5)(x), bare_linear(weight, 5)(x))


def test_the_memory_floor_reads_for_every_step() -> None:
    floor = MemoryFloor(SHAPE, torch.bfloat16)
    floor.begin(PROMPTS)
    assert len(floor.steps_s(3)) == 3


def test_agreement_ends_at_the_first_other_token() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2, 3], [1, 2, 3]) == 3
