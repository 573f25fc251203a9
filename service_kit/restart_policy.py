"""Owns when a process that died is started again. Pure.

RUNNING --died--> WAITING --due--> RUNNING; the delay doubles at each early death, and starts over after a healthy while.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

_MAX_DOUBLINGS = 60  # beyond it 2 ** n stops fitting a float


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    first_delay_s: float
    longest_delay_s: float
    healthy_s: float = 10.0  # who lived so long did not die of its start


@dataclass(frozen=True, slots=True)
class RestartState:
    phase: Literal["NEW", "RUNNING", "WAITING"] = "NEW"
    since_s: float = 0.0  # monotonic; of the phase
    early_deaths: int = 0  # in a row
    restarts: int = 0
    due_s: float = 0.0  # of the next start, where WAITING


def started(state: RestartState, now_s: float) -> RestartState:
    assert state.phase != "RUNNING"
    restarts = state.restarts + (state.phase == "WAITING")
    return replace(state, phase="RUNNING", since_s=now_s, restarts=restarts)


def died(state: RestartState, policy: RestartPolicy, now_s: float) -> RestartState:
    assert state.phase == "RUNNING"
    healthy = now_s - state.since_s >= policy.healthy_s
    early_deaths = 1 if healthy else state.early_deaths + 1
    delay_s = min(policy.first_delay_s * 2.0 ** min(early_deaths - 1, _MAX_DOUBLINGS), policy.longest_delay_s)
    return replace(state, phase="WAITING", since_s=now_s, early_deaths=early_deaths, due_s=now_s + delay_s)
