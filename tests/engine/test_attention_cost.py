"""Coefficients of what attention costs: found again in the times that they make, never implausible, more queries never cheaper."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from engine.attention_cost import (
    SHIPPED,
    AttentionCosts,
    Times,
    costs_of,
    few_queries,
    is_plausible,
    shipped_costs,
    timed_queries,
)

LANES_AND_PANELS = st.sampled_from([(16, 64), (8, 16)])
HEADS, CALL_S = 4, 3e-6


def times_of(costs: AttentionCosts) -> Times:
    """As a machine of these costs would be timed."""

    def empty_s(queries: int) -> float:
        return CALL_S + HEADS * costs.end_s(queries)

    asked = timed_queries(costs.lanes, costs.panel)
    warm = {queries: empty_s(queries) + HEADS * costs.chunk_s(queries) for queries in asked}
    cold = {queries: each + HEADS * costs.read_s(queries) for queries, each in warm.items()}
    return Times(
        HEADS,
        cold,
        warm,
        {queries: empty_s(queries) for queries in (1, costs.panel)},
        HEADS * costs.task,
    )


@given(LANES_AND_PANELS, st.floats(0.5, 2), st.floats(0.5, 2), st.floats(0.5, 2))
def test_the_costs_of_a_machine_are_found_in_its_times(
    shape: tuple[int, int], copy: float, vector: float, query: float
) -> None:
    shipped = shipped_costs(*shape)
    machine = replace(
        shipped,
        few=(1e-6, 2e-6, 3e-6),
        copy=shipped.copy * copy,
        vector=shipped.vector * vector,
        query=shipped.query * query,
    )
    found = costs_of(times_of(machine), *shape)
    for queries in (1, 2, 5, 9, 33, 100, 600):
        assert abs(found.chunk_s(queries) - machine.chunk_s(queries)) <= 1e-6 * machine.chunk_s(queries)
        assert abs(found.end_s(queries) - machine.end_s(queries)) <= 1e-6 * machine.end_s(queries)
        assert abs(found.read_s(queries) - machine.read_s(queries)) <= 1e-6 * machine.read_s(queries)


NOISE_S = st.floats(1e-7, 1e-2)


@given(LANES_AND_PANELS, st.data())
def test_whatever_was_timed_no_cost_is_negative_and_more_queries_never_take_less(
    shape: tuple[int, int], data: st.DataObject
) -> None:
    asked = timed_queries(*shape)

    def noise(places: tuple[int, ...]) -> dict[int, float]:
        return {queries: data.draw(NOISE_S) for queries in places}

    times = Times(HEADS, noise(asked), noise(asked), noise((1, shape[1])), data.draw(st.floats(-1e-3, 1e-3)))
    costs = costs_of(times, *shape)
    if not is_plausible(costs, shipped_costs(*shape)):
        return
    taken = [costs.chunk_s(queries) for queries in range(1, 300)]
    assert taken[0] > 0
    assert all(one <= two + 1e-12 for one, two in itertools.pairwise(taken))
    assert min(costs.read_few, costs.read_many, costs.task, costs.partial) >= 0


def test_times_of_a_disturbed_machine_are_implausible() -> None:
    assert is_plausible(SHIPPED, SHIPPED)
    for broken in (
        replace(SHIPPED, copy=0.0),
        replace(SHIPPED, query=0.0),
        replace(SHIPPED, vector=0.0),
        replace(SHIPPED, read_many=1.0),
        replace(SHIPPED, task=1.0),
        replace(SHIPPED, few=(0.0, 0.0, 0.0)),
    ):
        assert not is_plausible(broken, SHIPPED)


def test_a_slower_machine_of_the_same_proportions_is_plausible() -> None:
    times = times_of(SHIPPED)
    cold, warm, empty = (
        {queries: 3 * each for queries, each in column.items()} for column in (times.cold, times.warm, times.empty)
    )
    slower = Times(HEADS, cold, warm, empty, 3 * times.further_task)
    assert is_plausible(costs_of(slower, SHIPPED.lanes, SHIPPED.panel), SHIPPED)


def test_few_queries_are_those_that_read_keys_where_they_lie() -> None:
    assert few_queries(16) == (1, 4, 8)
    assert SHIPPED.most_few == few_queries(SHIPPED.lanes)[-1]
