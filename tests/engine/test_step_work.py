"""What of a step's attention is faster shared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.attention_cost import SHIPPED, AttentionCosts, shipped_costs
from engine.step_work import Run, StepWork, Threads

COSTS = st.sampled_from([SHIPPED, shipped_costs(8, 16)])
THREADS = st.builds(Threads, st.sampled_from([1, 2, 4, 16, 64]), st.sampled_from([1, 2, 4, 8]))
UNITS = st.lists(st.tuples(st.floats(1e-6, 1e-3), st.integers(1, 200)), min_size=1, max_size=30)


def work_of(
    costs: AttentionCosts, threads: Threads, members: int, queries: int, chunks: int, own: float = 0.2
) -> StepWork:
    return StepWork(costs, threads, [queries] * members, [chunks + own] * members, split=members < threads.units)


@given(THREADS, UNITS)
def test_threads_take_at_least_an_even_share_and_at_most_one_unit_more(
    threads: Threads, units: list[tuple[float, int]]
) -> None:
    unit_s, counts = (np.array(column, dtype=float) for column in zip(*units, strict=True))
    seconds, _ = threads.seconds(unit_s, counts)
    even = float(unit_s @ counts) / threads.count
    assert even * 0.999999 <= seconds <= even + unit_s.max()
    assert seconds >= unit_s.max() / (1.02 if threads.count > 1 else threads.count)


@given(THREADS, UNITS, st.floats(1e-6, 1e-3), st.integers(1, 9))
def test_more_work_never_takes_less(threads: Threads, units: list[tuple[float, int]], more_s: float, more: int) -> None:
    unit_s, counts = (np.array(column, dtype=float) for column in zip(*units, strict=True))
    before, _ = threads.seconds(unit_s, counts)
    after, _ = threads.seconds(np.append(unit_s, more_s), np.append(counts, more))
    assert after >= before * 0.97  # what is fine enough is not looked at more closely


@given(COSTS, st.integers(1, 96), st.integers(1, 12), st.integers(2, 40))
def test_nothing_is_won_by_sharing_where_a_query_more_costs_as_much_as_a_task_more(
    costs: AttentionCosts, queries: int, chunks: int, members: int
) -> None:
    """No vector to fill, no keys to copy or to wait for."""
    flat = replace(costs, few=(1e-6, 4e-6, 8e-6), copy=0.0, vector=0.0, query=1e-6, read_few=0.0, read_many=0.0)
    if costs.most_few != 8:
        flat = replace(flat, few=(1e-6, 2e-6, 4e-6))
    assert work_of(flat, Threads(), members, queries, chunks).shared(tuple(range(members)), 0, chunks) is None


@given(COSTS, st.integers(2, 64), st.integers(1, 96), st.integers(1, 12))
def test_on_one_thread_what_pays_over_some_chunks_pays_over_more(
    costs: AttentionCosts, members: int, queries: int, chunks: int
) -> None:
    paid = [
        work_of(costs, Threads(), members, queries, each).shared(tuple(range(members)), 0, each) is not None
        for each in (chunks, chunks + 1, 2 * chunks)
    ]
    assert paid == sorted(paid)


@given(COSTS, THREADS, st.integers(2, 40), st.integers(1, 96), st.integers(1, 12))
def test_what_does_not_pay_leaves_the_step_as_it_was(
    costs: AttentionCosts, threads: Threads, members: int, queries: int, chunks: int
) -> None:
    work = work_of(costs, threads, members, queries, chunks)
    everyone = tuple(range(members))
    if work.shared(everyone, 0, chunks) is None:
        assert work.shared(everyone, 0, chunks) is None


@given(COSTS, THREADS, st.integers(2, 40), st.integers(1, 96), st.integers(1, 6))
def test_only_a_run_from_the_first_chunk_on_is_one_task_and_only_where_threads_do_not_outnumber_heads(
    costs: AttentionCosts, threads: Threads, members: int, queries: int, chunks: int
) -> None:
    everyone = tuple(range(members))
    first = work_of(costs, threads, members, queries, chunks + 1).shared(everyone, 0, chunks)
    if first is not None and chunks > 1:
        assert not (first.whole and threads.count > threads.kv_heads)
    work = work_of(costs, threads, members, queries, chunks + 3)
    if work.shared(everyone, 0, 1):
        later = work.shared(everyone, 1, chunks + 2)
        assert later is None or not later.whole


@pytest.mark.parametrize("threads", [1, 4])
def test_many_decoding_rows_share_a_long_prefix_in_one_task(threads: int) -> None:
    work = work_of(SHIPPED, Threads(threads, 4), 64, 3, 5)
    assert work.shared(tuple(range(64)), 0, 5) == Run(tuple(range(64)), 0, 5, whole=True)


def test_one_chunk_of_two_members_does_not_pay_where_most_threads_would_have_no_work() -> None:
    assert work_of(SHIPPED, Threads(16, 1), 2, 8, 1).shared((0, 1), 0, 1) is None


def test_the_rest_of_a_step_keeps_threads_busy_that_the_shared_task_leaves_without_work() -> None:
    threads = Threads(16, 1)
    others = 2000
    among_others = StepWork(SHIPPED, threads, [1, 1] + [8] * others, [1.2, 1.2] + [0.8] * others, split=False)
    assert work_of(SHIPPED, threads, 2, 1, 1).shared((0, 1), 0, 1) is None
    assert among_others.shared((0, 1), 0, 1) is not None


def test_a_short_run_does_not_pay_where_it_cuts_long_tails_into_many_chunks() -> None:
    """A shared row's own chunks are tasks of their own, each with a result to merge."""
    costs = replace(SHIPPED, task=2e-6)
    assert work_of(costs, Threads(), 2, 2, 1).shared((0, 1), 0, 1) is not None
    assert work_of(costs, Threads(), 2, 2, 1, own=40.0).shared((0, 1), 0, 1) is None


def test_few_rows_share_what_does_not_stay_in_the_caches_and_read_by_themselves_what_does() -> None:
    """Four decoding rows of three queries each, where what they multiply together takes as long as by themselves."""
    costs = replace(SHIPPED, few=(10e-6, 12e-6, 25e-6), read_few=14e-6, read_many=28e-6, cached_chunks=15)
    members, threads = (0, 1, 2, 3), Threads(1, 4)
    assert work_of(costs, threads, 4, 3, 15).shared(members, 0, 15) is None
    assert work_of(costs, threads, 4, 3, 16).shared(members, 0, 16) == Run(members, 0, 16, whole=True)
    roomy = replace(costs, cached_chunks=100)
    assert work_of(roomy, threads, 4, 3, 16).shared(members, 0, 16) is None
