"""Varlen attention: the arguments through a float64 kernel, the call as torch knows it, and the trial before it is used.

No GPU is needed; nothing here has run on one.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention import Partial
from engine.cuda_varlen import (
    Form,
    Geometry,
    StepSequences,
    TorchVarlen,
    VarlenAttention,
    VarlenCall,
    accepted_by,
    chosen,
    device_attention,
    forms_of,
    installed_varlen,
    reference,
    trial,
    varlen_call,
)
from engine.paged_attention import PagedPool
from engine.torch_attention import TorchAttention

FORMS: tuple[Form, ...] = ("paged", "packed")
PAGE, KV_HEADS, HEADS, DIM = 16, 2, 6, 32


def keys_of(index: int, key: torch.Tensor, value: torch.Tensor, call: VarlenCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one sequence, as varlen_attn reads its arguments."""
    if call.block_table is not None:
        assert call.seqused_k is not None
        blocks, used = call.block_table[index].long(), int(call.seqused_k[index])
        return key[blocks].flatten(0, 1)[:used], value[blocks].flatten(0, 1)[:used]
    assert call.cu_seq_k is not None
    start, end = call.cu_seq_k[index : index + 2].tolist()
    return key[start:end], value[start:end]


class Float64Kernel:
    """A VarlenKernel in the plainest form. `lag`: how many of the newest keys a query misses, for a wrong one."""

    def __init__(self, lag: int = 0) -> None:
        self.lag = lag

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: VarlenCall, window: int
    ) -> Partial:
        outputs, sums = [], []
        for index, (start, end) in enumerate(zip(call.cu_seq_q[:-1].tolist(), call.cu_seq_q[1:].tolist(), strict=True)):
            keys, values = keys_of(index, key, value, call)
            assert end - start <= call.max_q
            assert len(keys) <= call.max_k
            for row in range(start, end):
                last = len(keys) - (end - row) - (self.lag if len(keys) > 1 else 0)
                seen = slice(max(0, last + 1 - window) if window else 0, last + 1)
                group = query.shape[1] // key.shape[-2]
                scores = torch.einsum(
                    "hd,thd->ht", query[row].double(), keys[seen].double().repeat_interleave(group, 1)
                )
                scores = scores * query.shape[-1] ** -0.5
                heads = values[seen].double().repeat_interleave(group, 1)
                outputs.append(torch.einsum("ht,thd->hd", scores.softmax(-1), heads))
                sums.append(scores.logsumexp(-1))
        return Partial(torch.stack(outputs).to(query.dtype), torch.stack(sums).float())


def pool_of(dtype: torch.dtype = torch.bfloat16, blocks: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, blocks, 2, PAGE, KV_HEADS, DIM, generator=generator).to(dtype)


def sequences_of(seed: int, shapes: list[tuple[int, int]]) -> StepSequences:
    """shapes: (queries, keys before them) of each."""
    ids = list(range(64))
    random.Random(seed).shuffle(ids)
    lengths = [count + past for count, past in shapes]
    blocks = [np.array([ids.pop() for _ in range(-(-length // PAGE))], dtype=np.int32) for length in lengths]
    return StepSequences(np.array([count for count, _ in shapes]), np.array(lengths), tuple(blocks))


@given(
    st.integers(0, 2**31),
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=6),
    st.sampled_from([0, 1, 7, 33]),
    st.sampled_from(FORMS),
)
@settings(max_examples=60, deadline=None)
def test_the_arguments_describe_each_sequences_own_keys(
    seed: int, shapes: list[tuple[int, int]], window: int, form: Form
) -> None:
    pool, sequences = pool_of(torch.float32), sequences_of(seed, shapes)
    query = torch.randn(int(sequences.counts.sum()), HEADS, DIM, generator=torch.Generator().manual_seed(seed))
    attention = VarlenAttention(pool, (0, window), Float64Kernel(), form)
    got = attention.prepared(sequences, torch.zeros(0, dtype=torch.int64)).partial(1, query)
    wanted = reference(query, pool[1], sequences, window)
    torch.testing.assert_close(got.output.double(), wanted.output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.lse.double(), wanted.lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_arguments_are_of_the_types_that_the_kernels_ask_for(form: Form) -> None:
    pool = PagedPool(pool_of())
    call, rows = varlen_call(sequences_of(1, [(1, 0), (5, 40), (1, 16)]), pool, form)
    assert (call.max_q, call.max_k) == (5, 45)
    assert call.cu_seq_q.tolist() == [0, 1, 6, 7]
    given_ = [one for one in (call.cu_seq_q, call.cu_seq_k, call.seqused_k, call.block_table) if one is not None]
    assert all(one.dtype == torch.int32 and one.is_contiguous() for one in given_)
    if form == "paged":
        assert rows is None
        assert call.cu_seq_k is None
        assert call.block_table is not None
        assert call.block_table.shape == (3, 3)
        assert len(set(call.block_table[0].tolist())) == 1  # padded with its own block, never another's
    else:
        assert rows is not None
        assert [len(places) for places in rows] == [63, 63]
        assert call.block_table is None


# ---- torch's own function


def test_the_installed_torch_takes_the_call_in_both_forms() -> None:
    """On the meta device: names, types and shapes of torch's real function, without its kernels."""
    kernel = installed_varlen()
    assert kernel is not None
    assert forms_of(kernel.accepted) == ["paged", "packed"]
    for form in FORMS:
        call, rows = varlen_call(sequences_of(1, [(1, 0), (5, 40)]), PagedPool(pool_of()), form)
        moved = [None if one is None else one.to("meta") for one in (call.cu_seq_k, call.seqused_k, call.block_table)]
        on_meta = VarlenCall(call.cu_seq_q.to("meta"), call.max_q, call.max_k, *moved)
        blocks = pool_of()[0].to("meta")
        keys = blocks[:, 0] if rows is None else blocks[:, 0].flatten(0, 1)[: len(rows[0])]
        made = kernel(torch.empty(6, HEADS, DIM, dtype=torch.bfloat16, device="meta"), keys, keys, on_meta, 7)
        assert (made.output.shape, made.lse.shape) == ((6, HEADS, DIM), (6, HEADS))


class Torch211:
    """The signature of torch 2.11, which has no pages; keeps what it was given."""

    def __init__(self) -> None:
        self.windows: list[tuple[int, int]] = []

    def varlen_attn(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor, max_q: int, max_k: int, *, return_aux: object = None, scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        assert return_aux == "lse"
        assert scale is None
        self.windows.append(window_size)
        left, right = window_size
        assert right == 0
        made = Float64Kernel()(query, key, value, VarlenCall(cu_seq_q, max_q, max_k, cu_seq_k, None, None), left + 1)
        return made.output, made.lse.transpose(0, 1)


def test_an_older_torch_gets_only_what_it_knows_and_passes_in_the_packed_form() -> None:
    older = Torch211()
    kernel = TorchVarlen(older.varlen_attn, accepted_by(older.varlen_attn), "lse")
    assert forms_of(kernel.accepted) == ["packed"]
    assert trial(pool_of(), Geometry(HEADS, (0, 9), torch.bfloat16), kernel, "packed") is None
    assert set(older.windows) == {(-1, 0), (8, 0)}


def test_a_torch_without_windows_has_no_form() -> None:
    assert forms_of(frozenset({"is_causal", "return_aux"})) == []


# ---- the choice

GEOMETRY = Geometry(HEADS, (0, 20), torch.bfloat16)


def test_a_right_kernel_is_taken() -> None:
    assert isinstance(chosen(pool_of(), GEOMETRY, Float64Kernel(), FORMS), VarlenAttention)


def test_a_kernel_that_misses_a_key_is_not_used() -> None:
    for form in FORMS:
        reason = trial(pool_of(), GEOMETRY, Float64Kernel(lag=1), form)
        assert reason is not None
        assert "away from" in reason
    assert isinstance(chosen(pool_of(), GEOMETRY, Float64Kernel(lag=1), FORMS), TorchAttention)


class NoSmallPages:
    """Refuses pages of 16 tokens, as the kernels inside torch do."""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: VarlenCall, window: int
    ) -> Partial:
        if call.block_table is not None:
            raise RuntimeError("Paged KV cache block size must be divisible by 256")
        return Float64Kernel()(query, key, value, call, window)


def test_where_the_kernel_refuses_the_pages_keys_are_packed() -> None:
    reason = trial(pool_of(), GEOMETRY, NoSmallPages(), "paged")
    assert reason is not None
    assert "divisible by 256" in reason
    attention = chosen(pool_of(), GEOMETRY, NoSmallPages(), FORMS)
    assert isinstance(attention, VarlenAttention)
    assert attention._form == "packed"


@pytest.mark.parametrize(
    ("pool", "geometry"),
    [
        (pool_of(torch.float32), Geometry(HEADS, (0,), torch.float32)),
        (pool_of(torch.float32), Geometry(HEADS, (0,), torch.bfloat16)),
        (pool_of()[..., :12], Geometry(HEADS, (0,), torch.bfloat16)),
    ],
)
def test_what_varlen_attention_cannot_compute_stays_with_torchs_operators(
    pool: torch.Tensor, geometry: Geometry
) -> None:
    assert isinstance(chosen(pool.contiguous(), geometry, Float64Kernel(), FORMS), TorchAttention)


def test_without_cuda_the_installed_torch_fails_its_trial() -> None:
    assert isinstance(device_attention(pool_of(), GEOMETRY), TorchAttention)
