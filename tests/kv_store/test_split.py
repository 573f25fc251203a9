"""How much of a prompt is loaded: as much as saves time, by the measured speeds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_store.split import Run, Speed, best_split


def speeds(**page_s: float) -> dict[str, Speed]:
    return {tier: Speed(value) for tier, value in page_s.items()}


def test_a_slow_tier_is_left_out_and_what_lies_before_it_is_loaded() -> None:
    runs = [Run("host", 4), Run("disk", 6)]
    split = best_split(runs, 10, speeds(host=0.001, disk=0.5), compute_page_s=0.1)
    assert split.load_pages == 4
    assert split.load_s == pytest.approx(0.004)
    assert split.compute_s == pytest.approx(0.6)


def test_a_slow_stretch_is_worth_it_where_a_long_fast_one_follows() -> None:
    runs = [Run("redis", 1), Run("host", 50)]
    assert best_split(runs, 60, speeds(host=0.001, redis=1.0), compute_page_s=0.1).load_pages == 51


@given(
    pages=st.lists(st.tuples(st.sampled_from(["host", "disk", "redis"]), st.integers(1, 40)), max_size=5),
    rest=st.integers(0, 40),
    costs=st.tuples(*[st.floats(1e-6, 1.0)] * 4),
)
def test_no_split_at_the_end_of_a_stretch_is_faster(
    pages: list[tuple[str, int]], rest: int, costs: tuple[float, ...]
) -> None:
    runs = [Run(tier, count) for tier, count in pages]
    known = speeds(host=costs[0], disk=costs[1], redis=costs[2])
    total = sum(run.pages for run in runs) + rest
    split = best_split(runs, total, known, costs[3])
    for end in range(len(runs) + 1):
        load_s = sum(run.pages * known[run.tier].page_s for run in runs[:end])
        computed = total - sum(run.pages for run in runs[:end])
        assert split.load_s + split.compute_s <= load_s + computed * costs[3] + 1e-9


def test_the_first_measurement_replaces_the_guess_and_later_ones_are_averaged() -> None:
    speed = Speed(1.0)
    speed.measured(10, 0.1)
    assert speed.page_s == pytest.approx(0.01)
    speed.measured(10, 0.2)
    assert 0.01 < speed.page_s < 0.02
    speed.measured(0, 5.0)
    assert speed.samples == 2
