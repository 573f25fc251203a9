"""Restart decisions, as a pure state machine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service_kit.restart_policy import RestartPolicy, RestartState, died, started

POLICY = RestartPolicy(first_delay_s=0.5, longest_delay_s=10.0, healthy_s=10.0)


def _delays(lives_s: list[float]) -> list[float]:
    state, now, delays = RestartState(), 0.0, []
    for life_s in lives_s:
        state = started(state, now)
        now += life_s
        state = died(state, POLICY, now)
        delays.append(state.due_s - now)
        now = state.due_s
    return delays


def test_the_delay_doubles_at_each_early_death_up_to_its_limit() -> None:
    assert _delays([0.0] * 7) == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_a_healthy_while_starts_the_delays_over() -> None:
    assert _delays([0.0, 0.0, 11.0, 0.0]) == [0.5, 1.0, 0.5, 1.0]


def test_the_first_start_is_no_restart() -> None:
    state = started(RestartState(), 0.0)
    assert state.restarts == 0
    assert started(died(state, POLICY, 1.0), 2.0).restarts == 1


@given(st.lists(st.floats(0, 1e6), max_size=200))
def test_a_delay_is_never_outside_its_bounds(lives_s: list[float]) -> None:
    assert all(0.49 <= delay_s <= 10.01 for delay_s in _delays(lives_s))
