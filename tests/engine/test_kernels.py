"""The C++ kernels, each built instruction set that this machine runs: against float64, and bit for bit against themselves."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from engine.attention_plan import Cut, Reader, plan
from engine.kernel_attention import ReaderBlocks, task_arrays
from engine.kernels.build import INSTRUCTION_SETS, ROUNDING, build, compiler
from engine.kernels.library import Kernels, load_kernels, usable_sets

PAGE = 16


@pytest.fixture(scope="module", params=usable_sets())
def kernels(request: pytest.FixtureRequest) -> Kernels:
    name = str(request.param)
    found = compiler()
    assert found is not None
    return Kernels(ctypes.CDLL(str(build(name, found))), name)


def test_the_best_library_of_the_machine_is_loaded_and_what_rounds_for_bfloat16_models_alone() -> None:
    loaded, of_bfloat16 = load_kernels(), load_kernels(dtype=torch.bfloat16)
    assert loaded is not None
    assert of_bfloat16 is not None
    assert loaded.instruction_set == next(name for name in usable_sets() if name != ROUNDING)
    assert of_bfloat16.instruction_set == usable_sets()[0]


def test_a_library_can_be_chosen_by_name_and_is_none_where_the_machine_lacks_its_instructions() -> None:
    for name in INSTRUCTION_SETS:
        chosen = load_kernels(name.lower(), torch.bfloat16)
        assert (chosen is not None and chosen.instruction_set == name) == (name in usable_sets())
    assert load_kernels(ROUNDING.lower(), torch.float32) is None


def met(kernels: Kernels, activations: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """What meets weights or KV that are stored in this dtype, float64."""
    rounds = kernels.instruction_set == ROUNDING and stored == torch.bfloat16
    return (activations.bfloat16() if rounds else activations).double()


# ---- linear layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k_count", "columns"), [(1, 1), (7, 5), (96, 160), (160, 97), (768, 1280), (2100, 70)])
def test_a_linear_layer_is_that_of_float64(kernels: Kernels, k_count: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(columns)
    weight, bias = (torch.randn(columns, k_count) / k_count**0.5).to(dtype), torch.randn(columns).to(dtype)
    packed = kernels.pack(weight, bias)
    for rows in (1, 2, 5, 6, 7, 13, 97, 300):
        x, onto = torch.randn(rows, k_count), torch.randn(rows, columns)
        wanted = met(kernels, x, dtype) @ weight.double().T + bias
        torch.testing.assert_close(kernels.linear(x, packed).double(), wanted, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(kernels.linear_onto(onto, x, packed).double(), onto + wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k_count", "columns"), [(1, 1), (7, 5), (96, 80), (160, 97), (1100, 200)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_gated_layer_is_that_of_float64(
    kernels: Kernels, k_count: int, columns: int, dtype: torch.dtype, biased: bool
) -> None:
    torch.manual_seed(columns)
    weight = (torch.randn(2 * columns, k_count) * 8 / k_count**0.5).to(dtype)
    bias = torch.randn(2 * columns).to(dtype) if biased else None
    packed = kernels.pack_gated(weight, bias)
    for rows in (1, 3, 6, 13, 97, 200):
        x = torch.randn(rows, k_count)
        gate, up = (met(kernels, x, dtype) @ weight.double().T + (0 if bias is None else bias)).chunk(2, dim=-1)
        wanted = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(kernels.gated(x, packed).double(), wanted, atol=1e-3, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k_count", [200, 1100, 2500])
def test_a_row_of_a_linear_layer_has_the_same_bits_in_every_batch(
    kernels: Kernels, k_count: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    weight = torch.randn(300, k_count).to(dtype) / k_count**0.5
    packed, gated = kernels.pack(weight, None), kernels.pack_gated(weight, None)
    x, onto = torch.randn(450, k_count), torch.randn(450, 300)
    together = kernels.linear(x, packed), kernels.linear_onto(onto, x, packed), kernels.gated(x, gated)
    assert torch.equal(together[1], onto + together[0])
    for first, count in ((0, 1), (3, 2), (10, 5), (100, 6), (77, 12), (50, 13), (0, 97), (90, 200), (449, 1)):
        rows = slice(first, first + count)
        assert torch.equal(kernels.linear(x[rows], packed), together[0][rows])
        assert torch.equal(kernels.linear_onto(onto[rows], x[rows], packed), together[1][rows])
        assert torch.equal(kernels.gated(x[rows], gated), together[2][rows])


# ---- small operations


def test_norms_and_rotations_are_those_of_float64(kernels: Kernels) -> None:
    torch.manual_seed(2)
    for rows, count in ((1, 96), (40, 97)):
        x, weight = torch.randn(rows, count) * 3, torch.randn(count)
        wanted = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        torch.testing.assert_close(kernels.norm(x, weight, 1e-6).double(), wanted, atol=1e-5, rtol=1e-5)
    wide, weight = torch.randn(20, 9, 32), torch.randn(6, 32)
    heads = wide[:, :6]
    wanted = heads.double() / (heads.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(kernels.norm(heads, weight, 1e-6).double(), wanted, atol=1e-5, rtol=1e-5)
    angles = torch.randn(20, 16)
    first, second = heads.double().chunk(2, dim=-1)
    cos, sin = angles.cos().double().unsqueeze(1), angles.sin().double().unsqueeze(1)
    wanted, untouched = torch.cat([first * cos - second * sin, second * cos + first * sin], -1), wide[:, 6:].clone()
    kernels.rotate(heads, torch.cat([angles.cos(), angles.sin()], -1))
    torch.testing.assert_close(heads.double(), wanted, atol=1e-6, rtol=1e-6)
    assert torch.equal(wide[:, 6:], untouched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_keys_and_values_are_written_to_their_slots_rounded_as_torch_rounds(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    pool = torch.zeros(6, 2, PAGE, 2, 32, dtype=dtype)
    key, value = torch.randn(5, 2, 32), torch.randn(5, 2, 32)
    key[0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    slots = torch.tensor([0, 17, 95, 33, 16])
    kernels.write(key, value, slots, pool)
    for row, slot in enumerate(slots.tolist()):
        for half, data in ((0, key), (1, value)):
            torch.testing.assert_close(
                pool[slot // PAGE, half, slot % PAGE].float(), rounded(data[row], dtype), rtol=0, atol=0, equal_nan=True
            )
    assert int((pool.float() != 0).any(-1).any(-1).sum()) == 10


def rounded(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As torch rounds; float8 saturates."""
    return (data.clamp(-448, 448) if dtype == torch.float8_e4m3fn else data).to(dtype).float()


def written(kernels: Kernels, data: torch.Tensor) -> torch.Tensor:
    """float32 [n * 32], through a float8 pool: the codes."""
    rows = data.view(-1, 1, 32)
    pool = torch.zeros(-(-len(rows) // PAGE), 2, PAGE, 1, 32, dtype=torch.float8_e4m3fn)
    kernels.write(rows, rows, torch.arange(len(rows)), pool)
    assert torch.equal(pool[:, 0].view(torch.uint8), pool[:, 1].view(torch.uint8))
    return pool[:, 0].reshape(-1)[: data.numel()]


def test_float8_is_rounded_as_torch_rounds_and_saturates(kernels: Kernels) -> None:
    """Every finite code, its neighbours, the ties between codes and their neighbours, what lies beyond, and many others."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    edges = torch.cat([codes, ties, torch.tensor([464.0, 480.0, 1e9, 3e38, float("inf"), 1e-40])])
    infinity = torch.tensor(float("inf"))
    edges = torch.cat([edges, edges.nextafter(infinity), edges.nextafter(-infinity)])
    torch.manual_seed(11)
    spread = torch.randn(1 << 16) * torch.randn(1 << 16).mul(6).exp()
    data = torch.cat([edges, -edges, torch.tensor([float("nan")]), spread])
    data = torch.nn.functional.pad(data, (0, -len(data) % 32))
    wanted = data.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(written(kernels, data).view(torch.uint8), wanted)


def test_every_float8_code_is_read_as_torch_reads_it(kernels: Kernels) -> None:
    """A query that sees one key gets its value."""
    codes = torch.arange(256, dtype=torch.uint8)
    pool = torch.zeros(1, 2, PAGE, 1, 256, dtype=torch.uint8)
    pool[0, 1, 0, 0] = codes
    alone = Tree(
        pool.view(torch.float8_e4m3fn), [Reader(0, 1, 0, np.zeros(1, dtype=np.int32))], torch.zeros(1, 1, 256),
        torch.ones(1, dtype=torch.int32),
    )  # fmt: skip
    wanted = codes.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(attended(kernels, alone)[0, 0], wanted, rtol=0, atol=0, equal_nan=True)


# ---- attention


@dataclass(frozen=True, slots=True)
class Tree:
    """Sequences that share prefixes, in a pool of random keys and values, and queries for their last tokens."""

    pool: torch.Tensor
    readers: list[Reader]
    query: torch.Tensor
    ends: torch.Tensor


def tree(source: random.Random, kernels: Kernels, dim: int = 32, dtype: torch.dtype = torch.float32) -> Tree:
    """A random forest: trunks of one or two chunks, branches that share them, tails of their own."""
    fresh, readers, start = iter(range(10**6)), list[Reader](), 0
    pages = kernels.chunk // PAGE
    for _ in range(source.choice([1, 2])):
        trunk = [next(fresh) for _ in range(source.choice([0, 1, pages, 2 * pages + 3]))]
        for _ in range(source.choice([1, 3])):
            branch = trunk + [next(fresh) for _ in range(source.choice([0, pages, pages + 5]))]
            for _ in range(source.choice([1, 2, 5])):
                count = source.choice([1, 1, 1, 2, 7, 40])
                first = len(branch) * PAGE + source.choice([0, 1, 15, 16, 100, 800])
                table = branch + [next(fresh) for _ in range(-(-(first + count) // PAGE) - len(branch))]
                readers.append(Reader(start, count, first, np.array(table, dtype=np.int32)))
                start += count
    torch.manual_seed(source.randrange(10**6))
    pool = torch.randn(next(fresh), 2, PAGE, 2, dim).to(dtype)
    ends = torch.cat([torch.arange(r.first, r.first + r.count, dtype=torch.int32) + 1 for r in readers])
    return Tree(pool, readers, torch.randn(start, 6, dim), ends)


def attended(
    kernels: Kernels, one: Tree, *, share: bool = True, window: int = 0, units: int = 1, group: int = 1
) -> torch.Tensor:
    tasks = plan(one.readers, Cut(kernels.chunk, PAGE, window, units, share, group))
    begins = (one.ends - window).clamp_(min=0) if window else torch.zeros_like(one.ends)
    return kernels.attention(one.query, one.pool, task_arrays(tasks, ReaderBlocks.of(one.readers), begins, one.ends))


def exact(kernels: Kernels, one: Tree, window: int = 0) -> torch.Tensor:
    """float64."""
    rows, scale = [], one.query.shape[-1] ** -0.5
    queries = met(kernels, one.query * scale, one.pool.dtype)
    for reader in one.readers:
        kv = one.pool[torch.from_numpy(reader.blocks).long()].float().double()
        key, value = (kv[:, half].reshape(-1, 2, kv.shape[-1]).repeat_interleave(3, 1) for half in (0, 1))
        for row in range(reader.count):
            end = reader.first + row + 1
            begin = max(0, end - window) if window else 0
            scores = torch.einsum("hd,thd->ht", queries[reader.start + row], key[begin:end])
            rows.append(torch.einsum("ht,thd->hd", scores.softmax(-1), value[begin:end]))
    return torch.stack(rows)


@pytest.mark.parametrize("seed", range(12))
def test_attention_over_trees_of_prefixes_is_that_of_float64(kernels: Kernels, seed: int) -> None:
    one = tree(random.Random(seed), kernels)
    torch.testing.assert_close(attended(kernels, one).double(), exact(kernels, one), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dim", [16, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_every_head_dimension_and_every_dtype_of_the_pool(kernels: Kernels, dim: int, dtype: torch.dtype) -> None:
    one = tree(random.Random(dim), kernels, dim, dtype)
    rounds = (
        kernels.instruction_set == ROUNDING and dtype == torch.bfloat16
    )  # the softmax's weights too, by 2^-9 at most
    tolerance = 4e-3 if rounds else 1e-5
    torch.testing.assert_close(attended(kernels, one).double(), exact(kernels, one), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [1, 16, 100, 900])
def test_a_window_hides_what_lies_before_it(kernels: Kernels, window: int) -> None:
    one = tree(random.Random(window), kernels)
    wanted = exact(kernels, one, window)
    torch.testing.assert_close(attended(kernels, one, window=window).double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("threads", [1, 2])
def test_sharing_splitting_and_company_change_no_bit(kernels: Kernels, seed: int, threads: int) -> None:
    dtype = (torch.float32, torch.bfloat16, torch.bfloat16, torch.float8_e4m3fn)[seed % 4]
    one = tree(random.Random(100 + seed), kernels, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = attended(kernels, one)
        assert torch.equal(attended(kernels, one, share=False), together)
        for units, group in ((100, 1), (4, 3), (2, 8), (1, 16)):  # what is shared, and in which tasks, differs
            assert torch.equal(attended(kernels, one, units=units, group=group), together)
        for reader in one.readers:
            rows = slice(reader.start, reader.start + reader.count)
            alone = Tree(
                one.pool, [Reader(0, reader.count, reader.first, reader.blocks)], one.query[rows], one.ends[rows]
            )
            assert torch.equal(attended(kernels, alone), together[rows])
            last = slice(rows.stop - 1, rows.stop)
            step = Reader(0, 1, reader.first + reader.count - 1, reader.blocks)
            decoded = Tree(one.pool, [step], one.query[last], one.ends[last])
            assert torch.equal(attended(kernels, decoded, units=100), together[last]), (
                "a chunk of a prompt, or a step of its own"
            )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("group", range(1, 10))
def test_few_queries_have_the_bits_of_many_whatever_their_number(kernels: Kernels, group: int) -> None:
    """Of a prompt's last rows alone, where lanes are keys, and among all its rows, where lanes are queries."""
    torch.manual_seed(group)
    for dim, dtype, first in ((32, torch.float32, 0), (64, torch.float8_e4m3fn, 700), (48, torch.bfloat16, 33)):
        reader = Reader(0, 100, first, np.arange(-(-(first + 100) // PAGE), dtype=np.int32)[::-1].copy())
        pool = torch.randn(len(reader.blocks), 2, PAGE, 2, dim).to(dtype)
        ends = torch.arange(first, first + 100, dtype=torch.int32) + 1
        whole = Tree(pool, [reader], torch.randn(100, 2 * group, dim), ends)
        together = attended(kernels, whole)
        for row in (0, 1, 15, 16, 47, 48, 99):
            step = Reader(0, 1, first + row, reader.blocks)
            alone = Tree(pool, [step], whole.query[row : row + 1], ends[row : row + 1])
            assert torch.equal(attended(kernels, alone)[0], together[row])


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("batch", [2, 3, 5, 8, 16, 24, 32, 48, 64, 96, 128])
def test_threads_have_even_work_however_many_rows_share_a_prefix(kernels: Kernels, batch: int, threads: int) -> None:
    pages = kernels.chunk // PAGE
    trunk = np.arange(5 * pages, dtype=np.int32)
    readers = [
        Reader(row, 1, 5 * kernels.chunk, np.append(trunk, np.int32(len(trunk) + row)).astype(np.int32))
        for row in range(batch)
    ]
    pool, query = torch.zeros(len(trunk) + batch, 2, PAGE, 4, 16), torch.zeros(batch, 12, 16)
    ends = torch.full((batch,), 5 * kernels.chunk + 1, dtype=torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tasks = plan(readers, Cut(kernels.chunk, PAGE, 0, -(-2 * threads // 4)))
        arrays = task_arrays(tasks, ReaderBlocks.of(readers), torch.zeros_like(ends), ends)
        assert kernels.unevenness(query, pool, arrays) < 1.15
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_garbage_behind_the_last_token_is_never_seen(kernels: Kernels, dtype: torch.dtype) -> None:
    one = tree(random.Random(7), kernels, dtype=dtype)
    wanted = attended(kernels, one)
    for reader in one.readers:
        last = reader.first + reader.count
        if last % PAGE:
            one.pool[reader.blocks[-1], :, last % PAGE :] = float("nan")
    assert torch.equal(attended(kernels, one), wanted)


def test_large_scores_do_not_overflow(kernels: Kernels) -> None:
    one = tree(random.Random(9), kernels)
    loud = Tree(one.pool, one.readers, one.query * 1000, one.ends)
    torch.testing.assert_close(attended(kernels, loud).double(), exact(kernels, loud), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("rise", [0.04, 0.08, 0.09, 0.5])
def test_scores_that_rise_slowly_or_fast_are_weighed_as_in_float64(kernels: Kernels, rise: float) -> None:
    """From one token to the next. Weights are relative to a score that is replaced only where others are e^8 times above it."""
    reader = Reader(0, 100, 900, np.arange(-(-1000 // PAGE), dtype=np.int32))
    torch.manual_seed(12)
    pool = torch.randn(len(reader.blocks), 2, PAGE, 2, 32)
    pool[:, 0] = rise * torch.arange(len(pool) * PAGE).reshape(-1, PAGE, 1, 1) / 32**0.5
    up, down = torch.ones(50, 6, 32), -torch.ones(50, 6, 32)
    one = Tree(pool, [reader], torch.cat([up, down]), torch.arange(900, 1000, dtype=torch.int32) + 1)
    together = attended(kernels, one)
    torch.testing.assert_close(together.double(), exact(kernels, one), atol=2e-4, rtol=2e-4)
    for row in (0, 49, 50, 99):
        alone = Tree(pool, [Reader(0, 1, 900 + row, reader.blocks)], one.query[row : row + 1], one.ends[row : row + 1])
        assert torch.equal(attended(kernels, alone)[0], together[row])


def test_a_row_that_sees_no_key_is_zero_beside_rows_that_do_and_alone(kernels: Kernels) -> None:
    """Cut into chunks as well: two empty sides, and an empty one beside a full one, come together in the merge."""
    pages = 2 * kernels.chunk // PAGE
    reader = Reader(0, 3, 2 * kernels.chunk - 3, np.arange(pages, dtype=np.int32))
    torch.manual_seed(11)
    pool = torch.randn(pages, 2, PAGE, 2, 32)
    ends = torch.arange(reader.first, reader.first + 3, dtype=torch.int32) + 1
    one = Tree(pool, [reader], torch.randn(3, 6, 32), ends)
    begins = torch.tensor([ends[0], kernels.chunk, 0], dtype=torch.int32)  # nothing; the second chunk; both
    wanted = exact(kernels, one)
    for units in (1, 100):
        tasks = plan(one.readers, Cut(kernels.chunk, PAGE, 0, units))
        assert any(tasks.merged) == (units > 1)
        got = kernels.attention(one.query, pool, task_arrays(tasks, ReaderBlocks.of(one.readers), begins, ends))
        assert not got[0].any()
        assert got[1].isfinite().all()
        torch.testing.assert_close(got[2].double(), wanted[2], atol=1e-5, rtol=1e-5)
