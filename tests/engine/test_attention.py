"""Attention over disjoint sets of keys, and their merge, against float64."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention import Partial, _attend_plain, attend_all, attend_causal, attend_masked, attend_rows, merge
from pdserve.errors import InternalError

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True, slots=True)
class Case:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def case(seed: int, queries: int, keys: int, kv_heads: int, group: int, dtype: torch.dtype = torch.float32) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return Case(random(queries, kv_heads * group, 16), random(keys, kv_heads, 16), random(keys, kv_heads, 16))


def exact(one: Case, allowed: torch.Tensor) -> Partial:
    """float64. allowed: [queries, keys], True where a query sees a key."""
    group = one.query.shape[1] // one.key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (one.key, one.value))
    scores = torch.einsum("nhd,thd->nht", one.query.double(), key) * one.query.shape[-1] ** -0.5
    scores = scores.masked_fill(~allowed[:, None, :], float("-inf"))
    return Partial(torch.einsum("nht,thd->nhd", scores.softmax(-1), value), scores.logsumexp(-1))


def assert_equal(got: Partial, wanted: Partial, tolerance: float) -> None:
    torch.testing.assert_close(got.output.double(), wanted.output, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got.lse.double(), wanted.lse, atol=tolerance, rtol=tolerance)


SEEDS = st.integers(0, 2**31)
SIZES = st.integers(1, 40)
HEADS = st.tuples(st.integers(1, 3), st.integers(1, 6))


@given(SEEDS, SIZES, SIZES, HEADS, st.sampled_from(list(TOLERANCES)))
@settings(max_examples=60)
def test_every_query_over_every_key(
    seed: int, queries: int, keys: int, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    one = case(seed, queries, keys, *heads, dtype)
    wanted = exact(one, torch.ones(queries, keys, dtype=torch.bool))
    assert_equal(attend_all(one.query, one.key, one.value), wanted, TOLERANCES[dtype])


@given(SEEDS, SIZES, HEADS)
@settings(max_examples=60)
def test_no_query_sees_a_later_key(seed: int, length: int, heads: tuple[int, int]) -> None:
    one = case(seed, length, length, *heads)
    wanted = exact(one, torch.ones(length, length, dtype=torch.bool).tril())
    assert_equal(attend_causal(one.query, one.key, one.value), wanted, 2e-5)


@given(SEEDS, st.lists(SIZES, min_size=1, max_size=5), HEADS)
@settings(max_examples=60)
def test_rows_see_the_keys_of_their_own_sequence_up_to_its_length(
    seed: int, lengths: list[int], heads: tuple[int, int]
) -> None:
    padded = max(lengths) + 3
    cases = [case(seed + row, 1, padded, *heads) for row in range(len(lengths))]
    mask = torch.zeros(len(lengths), padded)
    for row, length in enumerate(lengths):
        mask[row, length:] = float("-inf")
    got = attend_rows(
        torch.cat([one.query for one in cases]),
        torch.stack([one.key for one in cases]),
        torch.stack([one.value for one in cases]),
        mask[:, None, None, :],
    )
    for row, length in enumerate(lengths):
        wanted = exact(cases[row], (torch.arange(padded) < length)[None])
        assert_equal(Partial(got.output[row : row + 1], got.lse[row : row + 1]), wanted, 2e-5)


@given(SEEDS, SIZES, st.lists(st.integers(1, 30), min_size=2, max_size=6), HEADS, st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_partials_merge_in_any_tree_to_attention_over_all_keys(
    seed: int, queries: int, parts: list[int], heads: tuple[int, int], rng: random.Random
) -> None:
    one = case(seed, queries, sum(parts), *heads)
    pieces = list(zip(torch.split(one.key, parts), torch.split(one.value, parts), strict=True))
    partials = [attend_all(one.query, key, value) for key, value in pieces]
    while len(partials) > 1:
        rng.shuffle(partials)
        partials.append(merge(partials.pop(), partials.pop()))
    wanted = exact(one, torch.ones(queries, sum(parts), dtype=torch.bool))
    assert_equal(partials[0], wanted, 5e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_the_plain_form_for_other_devices_equals_the_operator(causal: bool) -> None:
    one = case(3, 9, 9, 2, 2)
    query, key, value = (x.transpose(0, 1)[None] for x in (one.query, one.key, one.value))
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    output, lse = _attend_plain(query, key, value, causal=causal, mask=None)
    allowed = torch.ones(9, 9, dtype=torch.bool)
    wanted = exact(one, allowed.tril() if causal else allowed)
    assert_equal(Partial(output[0].transpose(0, 1), lse[0].transpose(0, 1)), wanted, 2e-5)


# ---- what the operators and the formula get wrong where a query sees no key (algorithm card 2, traps)

NOTHING = float("-inf")


def nothing_seen(like: Partial, garbage: float) -> Partial:
    return Partial(torch.full_like(like.output, garbage), torch.full_like(like.lse, NOTHING))


@pytest.mark.parametrize("garbage", [0.0, float("nan"), float("inf")])
def test_an_empty_side_changes_no_bit_whatever_lies_in_its_output(garbage: float) -> None:
    one = case(4, 5, 9, 2, 3)
    seen = attend_all(one.query, one.key, one.value)
    for merged in (merge(seen, nothing_seen(seen, garbage)), merge(nothing_seen(seen, garbage), seen)):
        assert torch.equal(merged.output, seen.output)
        assert torch.equal(merged.lse, seen.lse)


def test_two_empty_sides_are_empty_and_merge_on() -> None:
    one = case(5, 5, 9, 2, 3)
    seen = attend_all(one.query, one.key, one.value)
    empty = merge(nothing_seen(seen, float("nan")), nothing_seen(seen, float("nan")))
    assert not empty.output.any()
    assert (empty.lse == NOTHING).all()
    assert torch.equal(merge(empty, seen).output, seen.output)


def test_a_real_nan_is_not_hidden_by_a_merge() -> None:
    one = case(6, 2, 9, 1, 1)
    seen = attend_all(one.query, one.key, one.value)
    broken = Partial(seen.output, torch.full_like(seen.lse, float("nan")))
    assert merge(seen, broken).output.isnan().all()


def test_a_row_that_is_masked_entirely_is_empty_and_merges_to_the_other_side() -> None:
    one, other = case(7, 4, 9, 2, 3), case(8, 4, 6, 2, 3)
    mask = torch.zeros(4, 9)
    mask[1] = NOTHING
    mask[2, 5:] = NOTHING
    got = attend_masked(one.query, one.key, one.value, mask)
    wanted = exact(one, mask == 0)
    assert_equal(
        Partial(got.output[[0, 2, 3]], got.lse[[0, 2, 3]]),
        Partial(wanted.output[[0, 2, 3]], wanted.lse[[0, 2, 3]]),
        2e-5,
    )
    assert not got.output[1].any()
    assert (got.lse[1] == NOTHING).all()
    rest = attend_all(one.query, other.key, other.value)
    assert torch.equal(merge(got, rest).output[1], rest.output[1])


def test_a_row_of_a_batch_that_is_masked_entirely_is_empty() -> None:
    one = case(9, 1, 8, 2, 3)
    mask = torch.zeros(2, 1, 1, 8)
    mask[1] = NOTHING
    query, key, value = (torch.cat([x, x]) for x in (one.query, one.key[None], one.value[None]))
    got = attend_rows(query, key, value, mask)
    assert_equal(Partial(got.output[:1], got.lse[:1]), exact(one, torch.ones(1, 8, dtype=torch.bool)), 2e-5)
    assert not got.output[1].any()
    assert (got.lse[1] == NOTHING).all()


def test_no_keys_at_all_are_an_error_and_not_the_end_of_the_process() -> None:
    one = case(10, 4, 3, 2, 3)
    for attend in (attend_all, attend_causal):
        with pytest.raises(InternalError, match="no keys"):
            attend(one.query[:0] if attend is attend_causal else one.query, one.key[:0], one.value[:0])
