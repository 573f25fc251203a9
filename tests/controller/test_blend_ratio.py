"""A blend's ratio follows from measured speeds: never below the floor, never above the cap, and never slower than a whole prefill."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from controller.blend_ratio import CAP, FLOOR, MOST_COMPUTED, BlendCost, choose_ratio


@st.composite
def costs(draw: st.DrawFn) -> BlendCost:
    prompt = draw(st.integers(18, 32_768))
    chunked = draw(st.integers(16, prompt - 2))
    token_s = draw(st.floats(1e-7, 1e-2))
    load_s = draw(st.floats(0, 1.5)) * prompt * token_s
    return BlendCost(prompt, chunked, draw(st.integers(1, 100)), token_s, load_s)


@given(costs())
def test_a_ratio_lies_between_floor_and_cap_and_its_blend_is_predicted_faster(cost: BlendCost) -> None:
    choice = choose_ratio(cost)
    if choice.ratio is not None:
        assert FLOOR <= choice.ratio <= CAP
        assert cost.blend_s(choice.ratio) == choice.blend_s < choice.whole_s


@given(costs())
def test_a_prompt_is_computed_whole_only_where_even_the_floor_is_not_faster(cost: BlendCost) -> None:
    assert (choose_ratio(cost).ratio is None) == (cost.blend_s(FLOOR) >= cost.whole_s)


@given(costs())
def test_between_floor_and_cap_recomputing_takes_as_long_as_loading(cost: BlendCost) -> None:
    ratio = choose_ratio(cost).ratio
    if ratio is None or not FLOOR < ratio < CAP:
        return
    assert cost.computed_s(ratio) <= MOST_COMPUTED * cost.whole_s
    assert ratio * cost.recompute_s <= cost.load_s * (1 + 1e-9)
    assert (ratio + 0.01) * cost.recompute_s > cost.load_s * (1 - 1e-9)


@given(costs(), st.floats(0, 1))
def test_a_faster_load_never_makes_a_blend_that_was_worth_it_worthless(cost: BlendCost, share: float) -> None:
    assume(choose_ratio(cost).ratio is not None)
    faster = BlendCost(cost.prompt_tokens, cost.chunk_tokens, cost.layers, cost.token_s, cost.load_s * share)
    assert choose_ratio(faster).ratio is not None


@given(costs())
def test_without_a_measured_prefill_the_floor_is_taken(cost: BlendCost) -> None:
    unknown = BlendCost(cost.prompt_tokens, cost.chunk_tokens, cost.layers, 0.0, cost.load_s)
    assert choose_ratio(unknown).ratio == FLOOR


def test_a_ratio_that_engines_would_not_blend_with_gives_way_to_the_floor() -> None:
    few_chunks = BlendCost(4000, 1600, 10, 1e-3, 0.7)
    assert few_chunks.computed_s(CAP) > MOST_COMPUTED * few_chunks.whole_s
    assert choose_ratio(few_chunks).ratio == FLOOR


# 4,000 tokens of 1 ms in 10 layers, 3,200 of them in chunks: recomputing these takes 2.56 s, the first layer 0.4 s.
@pytest.mark.parametrize(
    ("load_s", "ratio", "blend_s"),
    [
        (0.0, 0.15, 4 - 0.85 * 2.56),
        (0.3, 0.15, 4 - 0.85 * 2.56),
        (0.64, 0.25, 4 - 0.75 * 2.56 + 0.24),
        (1.2, 0.46, 4 - 0.54 * 2.56 + 0.8),
        (1.5, 0.5, 4 - 0.5 * 2.56 + 1.1),
        (2.0, 0.15, 4 - 0.85 * 2.56 + 1.6),
        (2.6, None, 4 - 0.85 * 2.56 + 2.2),
    ],
)
def test_as_the_load_takes_longer(load_s: float, ratio: float | None, blend_s: float) -> None:
    choice = choose_ratio(BlendCost(4000, 3200, 10, 1e-3, load_s))
    assert choice.ratio == ratio
    assert choice.blend_s == pytest.approx(blend_s)
    assert choice.whole_s == pytest.approx(4.0)
