"""Contract of paged attention: both implementations against float64 over what the pool holds, in every dtype of a pool."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest
import torch

from engine.block_tables import Table
from engine.kernel_attention import KernelAttention
from engine.kernels.library import load_kernels
from engine.paged_attention import PagedAttention, PagedPool
from engine.prefix_index import KeyChain
from engine.schedule import Part
from engine.sequences import DispatchState, Sequence
from engine.step_batch import StepBuffers
from engine.torch_attention import TorchAttention
from tests.engine.rig import work

PAGE, HEADS, KV_HEADS, DIM = 16, 6, 2, 32
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]
LENGTHS = [(0, 1), (37, 1), (900, 1), (0, 20), (15, 33), (64, 70)]  # (computed before, rows of the step) of a sequence
Maker = Callable[[torch.Tensor, int], PagedAttention]


def of_torch(pool: torch.Tensor, window: int) -> PagedAttention:
    return TorchAttention(pool, [0, window])


def of_kernels(pool: torch.Tensor, window: int) -> PagedAttention:
    kernels = load_kernels()
    assert kernels is not None
    return KernelAttention(pool, kernels, [0, window], share=True)


def parts() -> list[Part]:
    fresh, found = iter(range(1, 1000)), list[Part]()
    for key, (computed, count) in enumerate(LENGTHS):
        tokens = array("i", range(5, 5 + computed + count))
        state = DispatchState(work(key, list(tokens)), "generate", "active", key, 0.0, {0})
        chain = KeyChain(PAGE, b"", 0)
        table = Table(array("i", (next(fresh) for _ in range(-(-len(tokens) // PAGE)))), chain)
        found.append(Part(Sequence(state, (0,), tokens, chain, table, computed), count))
    return found


def stored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (x.clamp(-448, 448) if dtype == torch.float8_e4m3fn else x).to(dtype).float()


def exact(pool: torch.Tensor, query: torch.Tensor, blocks: list[int], ends: range, window: int) -> torch.Tensor:
    """float64 [rows, heads, dim] of the rows that end before `ends`; pool: one layer."""
    kv = pool[torch.tensor(blocks)].float().double()
    key, value = (kv[:, half].reshape(-1, KV_HEADS, DIM).repeat_interleave(HEADS // KV_HEADS, 1) for half in (0, 1))
    rows = []
    for row, end in enumerate(ends):
        seen = slice(max(0, end - window) if window else 0, end)
        scores = torch.einsum("hd,thd->ht", query[row].double(), key[seen]) * DIM**-0.5
        rows.append(torch.einsum("ht,thd->hd", scores.softmax(-1), value[seen]))
    return torch.stack(rows)


def poison_behind(pool: torch.Tensor, step_parts: list[Part]) -> None:
    """NaN behind the last token of every sequence, as a former owner of the block may have left it."""
    for part in step_parts:
        table, end = part.sequence.table, part.sequence.computed + part.count
        assert table is not None
        if end % PAGE:
            pool[:, table.blocks[-1], :, end % PAGE :] = float("nan")


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("maker", [of_torch, of_kernels])
def test_attention_is_that_of_float64_over_what_the_pool_holds(maker: Maker, dtype: torch.dtype, window: int) -> None:
    torch.manual_seed(4)
    step_parts = parts()
    pool = torch.randn(2, 200, 2, PAGE, KV_HEADS, DIM).to(dtype)
    poison_behind(pool, step_parts)
    batch = StepBuffers(PAGE, torch.device("cpu")).build(step_parts)
    rows = len(batch.positions)
    query, key, value = (torch.randn(rows, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    value *= 300  # beyond what float8 holds
    step = maker(pool, window).step(batch)
    for layer in (0, 1):
        step.write(layer, key, value)
        got = step.attend(layer, query, key, value)
        for part, start in zip(batch.parts, batch.starts, strict=True):
            assert part.sequence.table is not None
            own, first = slice(start, start + part.count), part.sequence.computed
            blocks = list(part.sequence.table.blocks)
            kept = pool[layer][torch.tensor(blocks)].float().transpose(0, 1).reshape(2, -1, KV_HEADS, DIM)
            assert torch.equal(kept[0, first : first + part.count], stored(key[own], dtype))
            assert torch.equal(kept[1, first : first + part.count], stored(value[own], dtype))
            ends = range(first + 1, first + part.count + 1)
            wanted = exact(pool[layer], query[own], blocks, ends, window if layer else 0)
            torch.testing.assert_close(got[own].double(), wanted, atol=2e-3, rtol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_views_of_a_pool_round_to_nearest_and_saturate(dtype: torch.dtype) -> None:
    pool = torch.zeros(1, 3, 2, PAGE, 1, 4, dtype=dtype)
    views, data = PagedPool(pool), torch.tensor([[[1.03, -447.0, 3e4, float("nan")]]])
    views.write(0, views.rows(torch.tensor([PAGE + 2])), data, -data)
    keys, values = views.gather(0, torch.tensor([1]), torch.float32)
    places = views.take(0, views.rows(torch.tensor([PAGE + 2])))
    for kept, row, given in ((keys, places[0], data), (values, places[1], -data)):
        assert row.dtype == dtype
        torch.testing.assert_close(kept[2:3], stored(given, dtype), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(row.float(), stored(given, dtype), rtol=0, atol=0, equal_nan=True)
    assert int((pool.float() != 0).sum()) == 8
