"""Which tokens a blend computes anew: pure."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.blend_selection import Blend, Epic, Span, deviations, keep, lay_out, plan_selection, shares
from pdserve.errors import InvalidRequest

SPANS = [Span(3, 4), Span(7, 2), Span(12, 5)]  # of a prompt of 20 tokens


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 40))
@settings(max_examples=200)
def test_shares_fall_from_layer_to_layer_and_their_mean_is_the_ratio(
    ratio: float, filtering: float, layers: int
) -> None:
    found = shares(Blend(ratio, filtering), layers)
    assert len(found) == max(0, layers - 2)
    assert all(one >= other - 1e-12 for one, other in pairwise(found))
    assert all(-1e-12 <= share <= 1 + 1e-12 for share in found)
    if found:
        assert sum(found) / len(found) == pytest.approx(ratio)


def test_without_filtering_one_set_is_chosen_once() -> None:
    layout = lay_out(0, 20, SPANS)
    assert plan_selection(Blend(0.25, 0.0), 6, layout).kept == (None, 9 + 3, None, None, None, None)
    assert plan_selection(Blend(0.25, 1.0), 6, layout).kept == (None, 9 + 6, 9 + 4, 9 + 2, 9 + 0, None)


def test_a_share_that_is_a_whole_number_of_tokens_is_not_rounded_up() -> None:
    layout = lay_out(0, 101, [Span(0, 100)])
    for hundredths in range(101):
        kept = plan_selection(Blend(hundredths / 100, 0.0), 3, layout).kept[1]
        assert kept == 1 + hundredths


def test_the_first_tokens_of_each_chunk_but_of_one_at_the_start() -> None:
    first = plan_selection(Epic(2), 4, lay_out(0, 20, [Span(0, 3), *SPANS])).first
    assert first.tolist() == [3, 4, 7, 8, 9, 10, 11, 12, 13, 17, 18, 19]
    assert plan_selection(Epic(0), 4, lay_out(0, 20, SPANS)).first.tolist() == [0, 1, 2, 9, 10, 11, 17, 18, 19]


def test_rows_are_counted_from_what_is_there_already() -> None:
    layout = lay_out(3, 20, SPANS)
    assert layout.chunk_rows.tolist() == [*range(6), *range(9, 14)]
    assert layout.ordinals.tolist() == [*range(6), -1, -1, -1, *range(6, 11), -1, -1, -1]
    assert layout.competing == 11


def test_the_last_token_never_competes() -> None:
    layout = lay_out(0, 17, SPANS)
    assert layout.competing == 10
    assert 16 in plan_selection(Epic(0), 4, layout).first.tolist()


@given(st.lists(st.tuples(st.floats(0, 10), st.booleans()), min_size=1, max_size=60), st.data())
@settings(max_examples=200)
def test_what_is_kept_deviates_at_least_as_much_as_what_is_not(
    rows: list[tuple[float, bool]], data: st.DataObject
) -> None:
    deviation, always = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
    count = data.draw(st.integers(int(always.sum()), len(rows)))
    kept = keep(deviation, always, count)
    assert len(kept) == count
    assert kept.tolist() == sorted(set(kept.tolist()))
    dropped = torch.ones(len(rows), dtype=torch.bool)
    dropped[kept] = False
    assert not (dropped & always).any()
    chosen = ~dropped & ~always
    if chosen.any() and dropped.any():
        assert deviation[chosen].min() >= deviation[dropped].max()


def test_of_equal_rows_the_earlier_ones_are_kept() -> None:
    assert keep(torch.zeros(8), torch.arange(8) == 6, 4).tolist() == [0, 1, 2, 6]


def test_deviations_are_relative_and_add_up() -> None:
    key, value = torch.full((3, 2, 4), 2.0), torch.full((3, 2, 4), 10.0)
    taken_key, taken_value = key.clone(), value.clone()
    taken_key[1] += 1.0  # a quarter of its square
    taken_value[2] -= 10.0
    taken_value[1] += 1.0
    found = deviations((key, value), (taken_key, taken_value))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.26, 1.0]))


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_ratios_outside_0_to_1_are_refused(ratio: float) -> None:
    with pytest.raises(InvalidRequest):
        Blend(ratio)
    with pytest.raises(InvalidRequest):
        Blend(0.1, filtering=ratio)
    with pytest.raises(InvalidRequest):
        Epic(-1)
