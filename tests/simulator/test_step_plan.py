"""The composition of a modelled step and its cost: decodes first, chunks under the budget, weights paid for once."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import block_tables
from engine.prefix_index import KeyChain
from engine.protocol import Dispatch, SetPolicy
from simulator.block_tables import Table
from simulator.cost_model import PRESETS, CostModel
from simulator.dispatch_state import DispatchState, Sequence
from simulator.step_plan import plan_step
from tests.simulator.works import work

COST = CostModel(0.5, 0.01, 0.1, 0.02, 0.001)


def table(token_count: int) -> Table:
    """With KV, and without the blocks for it: a plan looks at the length only."""
    return Table(block_tables.Table(array("i"), KeyChain(16, b"", 0)), array("i", range(token_count)))


def prompt(tokens: int, key: int = 1) -> DispatchState:
    return DispatchState(work([1] * tokens, key=key), "generate", "prefilling", {0}, 0.0, table(0))


def sequence(context: int) -> Sequence:
    return Sequence(Dispatch(1, 1), 0, table(context), b"", 5, 1)


@given(
    st.lists(st.integers(1, 3000), max_size=6),
    st.integers(0, 40),
    st.integers(16, 2048),
    st.integers(0, 512),
)
def test_a_step_stays_under_its_budget_unless_one_unchunked_prompt_is_larger(
    prompts: list[int], decodes: int, budget: int, chunk: int
) -> None:
    policy = SetPolicy(budget, max_running=32, prefill_chunk=chunk, decode_headroom_blocks=0)
    plan = plan_step([sequence(10)] * decodes, [prompt(tokens) for tokens in prompts], policy, COST)
    if plan is None:
        assert not prompts
        assert not decodes
        return
    assert len(plan.decodes) == min(decodes, 32)
    taken = [tokens for _, tokens in plan.chunks]
    assert all(tokens > 0 for tokens in taken)
    if chunk:
        assert sum(taken) + len(plan.decodes) <= max(budget, len(plan.decodes) + 1)
        assert all(tokens <= chunk for tokens in taken)
    elif sum(taken) + len(plan.decodes) > budget:
        assert len(taken) <= 1


def test_prompts_are_served_in_the_order_of_admission() -> None:
    policy = SetPolicy(100, 32, prefill_chunk=80, decode_headroom_blocks=0)
    first, second = prompt(200, key=1), prompt(200, key=2)
    plan = plan_step([], [first, second], policy, COST)
    assert plan is not None
    assert plan.chunks == ((first, 80), (second, 20))


def test_a_mixed_step_pays_the_larger_fixed_part_once() -> None:
    assert COST.step_s(10, 2, 100) == pytest.approx(0.5 + 0.1 + 0.04 + 0.1)
    assert COST.step_s(0, 2, 100) == pytest.approx(0.1 + 0.04 + 0.1)
    assert COST.step_s(0, 0, 0) == 0


def test_a_prompt_alone_costs_one_fixed_part_per_chunk() -> None:
    assert COST.prefill_s(100) == pytest.approx(0.5 + 1.0)
    assert COST.prefill_s(100, 40) == pytest.approx(3 * 0.5 + 1.0)


@pytest.mark.parametrize("name", [name for name in PRESETS if "llama" in name])
def test_presets_keep_the_shape_of_the_tables_they_were_fitted_to(name: str) -> None:
    cost = PRESETS[name]
    assert 0.05 < cost.prefill_s(512) < 0.12  # 54 to 94 ms in the tables, fits are off by 18 ms at most
    assert 0.028 < cost.step_s(0, 1, 600) < 0.05
    assert cost.step_s(0, 64, 64 * 600) < 2 * cost.step_s(0, 1, 600)
