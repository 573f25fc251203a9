"""What a page is worth: its recompute grows with its place, and a tier saves only what the next best source would take more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_store.benefit import LEAST_BENEFIT_S, ComputeCost, benefit_s
from kv_store.split import Speed

seconds = st.floats(1e-6, 1e3)
growths = st.floats(0.0, 1.0)
ordinals = st.integers(0, 10_000)
speeds = st.builds(Speed, page_s=seconds, samples=st.integers(0, 3))
measured_speeds = st.builds(Speed, page_s=seconds, samples=st.integers(1, 3))


def test_before_a_measurement_a_page_has_no_cost() -> None:
    cost = ComputeCost(growth=0.1)
    cost.offered([3, 4])
    cost.measured(0.0)
    assert cost.of(7) == 0.0


def test_the_measured_mean_is_the_cost_of_a_page_as_deep_as_those_offered() -> None:
    cost = ComputeCost(growth=0.5)
    cost.measured(0.02)
    cost.offered([0, 1, 2])
    assert cost.of(1) == pytest.approx(0.02)
    assert cost.of(0) == pytest.approx(0.02 / 1.5)
    assert cost.of(4) == pytest.approx(0.02 * 3 / 1.5)


def test_the_depth_of_what_is_computed_is_followed_slowly_and_an_empty_offer_says_nothing() -> None:
    cost = ComputeCost(growth=0.5)
    cost.offered([10])
    cost.offered([])
    assert cost.ordinal == 10
    cost.offered([20])
    assert cost.ordinal == pytest.approx(11)


@given(growths, seconds, st.lists(ordinals, min_size=1, max_size=20), ordinals)
def test_each_page_costs_more_than_the_one_before_by_the_same_time(
    growth: float, page_s: float, offered: list[int], ordinal: int
) -> None:
    cost = ComputeCost(growth)
    cost.measured(page_s)
    cost.offered(offered)
    step_s = cost.of(1) - cost.of(0)
    assert cost.of(ordinal) == pytest.approx(cost.of(0) + ordinal * step_s, rel=1e-6)
    assert step_s == pytest.approx(growth * cost.of(0), rel=1e-6, abs=1e-12 * page_s)


@given(growths, seconds, st.lists(ordinals, min_size=1, max_size=20))
def test_the_costs_of_the_pages_offered_add_up_to_what_was_measured(
    growth: float, page_s: float, offered: list[int]
) -> None:
    cost = ComputeCost(growth)
    cost.measured(page_s)
    cost.offered(offered)
    assert sum(map(cost.of, offered)) == pytest.approx(len(offered) * page_s)


def test_the_last_tier_saves_the_compute_but_for_its_own_load() -> None:
    assert benefit_s(0.5, Speed(0.1, samples=1), []) == pytest.approx(0.4)


def test_above_a_fast_tier_a_page_is_worth_what_that_one_takes_longer_whatever_computing_takes() -> None:
    host, disk, redis = Speed(0.001, samples=1), Speed(0.004, samples=1), Speed(0.002, samples=1)
    assert benefit_s(0.5, host, [disk]) == benefit_s(50.0, host, [disk]) == pytest.approx(0.003)
    assert benefit_s(0.5, host, [disk, redis]) == pytest.approx(0.001)


def test_a_page_that_is_faster_from_elsewhere_is_worth_next_to_nothing_which_is_not_unmeasured() -> None:
    assert benefit_s(0.5, Speed(0.6, samples=1), []) == LEAST_BENEFIT_S > 0


def test_a_far_tier_that_was_never_read_does_not_count_but_the_next_one_is_waited_for() -> None:
    host, disk, guess = Speed(0.001, samples=1), Speed(0.004, samples=1), Speed(0.0001)
    assert benefit_s(0.5, host, [disk, guess]) == pytest.approx(0.003)
    assert benefit_s(0.5, host, [guess, disk]) == 0.0
    assert benefit_s(0.5, guess, [disk]) == 0.0
    assert benefit_s(0.0, host, [disk]) == 0.0


@given(seconds, measured_speeds, measured_speeds, st.lists(speeds, max_size=3))
def test_a_benefit_is_never_more_than_computing_nor_than_the_next_tier_and_never_zero(
    recompute_s: float, here: Speed, following: Speed, rest: list[Speed]
) -> None:
    benefit = benefit_s(recompute_s, here, [following, *rest])
    assert LEAST_BENEFIT_S <= benefit <= max(LEAST_BENEFIT_S, min(recompute_s, following.page_s) - here.page_s)


@given(seconds, measured_speeds, measured_speeds, st.lists(speeds, max_size=3), speeds)
def test_another_lower_tier_makes_no_page_worth_more(
    recompute_s: float, here: Speed, following: Speed, rest: list[Speed], last: Speed
) -> None:
    below = [following, *rest]
    assert benefit_s(recompute_s, here, [*below, last]) <= benefit_s(recompute_s, here, below)


@given(seconds, seconds, speeds, st.lists(speeds, max_size=3))
def test_of_two_pages_in_a_tier_the_dearer_to_compute_is_never_worth_less(
    one_s: float, other_s: float, here: Speed, below: list[Speed]
) -> None:
    cheap_s, dear_s = sorted((one_s, other_s))
    assert benefit_s(cheap_s, here, below) <= benefit_s(dear_s, here, below)
