"""Owns placement: Filter -> Score -> Pick over an immutable snapshot. Pure; chance comes from the caller's `rng`.

Candidates are pairs (prefill worker, decode worker), and single workers that hold both roles ("local"). Where one token is all that
is wanted, a prefill worker is local too, and there are no pairs: that token comes with the prompt's KV. Where nobody is a candidate
because a pool is empty, any worker that is ready may serve alone ("last_resort"), so that losing a pool does not end service.
Pairs are formed only of the best few of each side: with hundreds of workers, the others cannot win unless those few do not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

from controller.placement.decision import CandidateKind, Pick
from controller.placement.filters import (
    CAPACITY,
    NEVER,
    common_transport,
    decode_refusal,
    pair_refusal,
    prefill_refusal,
    worker_refusal,
)
from controller.placement.policies import Policy
from controller.placement.snapshot import Demand, FleetSnapshot, WorkerView

EPSILON = 1e-3
PAIRED_WIDTH = 8
Shortage = Literal["capacity", "no_prefill", "no_decode", "too_long"]


class Scored(NamedTuple):
    score: float
    kind: CandidateKind
    prefill: WorkerView
    decode: WorkerView


@dataclass(frozen=True, slots=True)
class Outcome:
    """Either a pick, or what is short."""

    pick: Pick | None
    reason: str  # "best", "only", "tie", "forced", "last_resort", or the shortage
    shortage: Shortage | None = None


class Sides(NamedTuple):
    """Workers that passed, by cost of their own part, and the reasons of those that did not."""

    prefill: list[tuple[float, WorkerView]]
    decode: list[tuple[float, WorkerView]]
    local: list[Scored]
    prefill_refusals: set[str]
    decode_refusals: set[str]


def place(snapshot: FleetSnapshot, demand: Demand, policy: Policy, rng: Random) -> Outcome:
    if demand.route is not None:
        return _forced(snapshot, demand)
    sides = split_sides(snapshot, demand, policy)
    candidates = [*pairs(sides, demand, policy), *sides.local]
    if candidates:
        return _pick(candidates, demand, rng)
    short = _shortage(sides)
    if short in ("no_prefill", "no_decode"):
        resort = last_resorts(snapshot, demand, policy)
        if resort:
            return Outcome(_as_pick(_draw(resort, rng)[0], demand), "last_resort")
        short = _last_shortage(snapshot, demand, short)
    return Outcome(None, short, short)


def split_sides(snapshot: FleetSnapshot, demand: Demand, policy: Policy) -> Sides:
    sides = Sides([], [], [], set(), set())
    for view in snapshot.workers:
        refusal = worker_refusal(view, demand)
        prefill = (refusal or prefill_refusal(view, demand)) if view.prefill else "role_not_held"
        decode = (refusal or decode_refusal(view, demand)) if view.decode else "role_not_held"
        prefill_cost = 0.0 if prefill else sum(policy.prefill_terms(view, demand))
        decode_cost = 0.0 if decode else sum(policy.decode_terms(view, demand))
        _enter(sides.prefill, sides.prefill_refusals, prefill, prefill_cost, view)
        _enter(sides.decode, sides.decode_refusals, decode, decode_cost, view)
        if not prefill and (not decode or (demand.one_token and not view.decode)):
            sides.local.append(Scored(alone_score(view, demand, policy), "local", view, view))
    return sides


def _enter(
    passed: list[tuple[float, WorkerView]], refusals: set[str], refusal: str, cost: float, view: WorkerView
) -> None:
    if refusal:
        refusals.add(refusal)
    else:
        passed.append((cost, view))


def pairs(sides: Sides, demand: Demand, policy: Policy) -> list[Scored]:
    """Scored pairs of the best few of each side; of everybody, where none of those fit together."""
    if demand.one_token and sides.local:
        return []
    prefills = sorted(sides.prefill, key=_cost)
    decodes = sorted(sides.decode, key=_cost)
    found = _paired(prefills[:PAIRED_WIDTH], decodes[:PAIRED_WIDTH], demand, policy)
    if not found and max(len(prefills), len(decodes)) > PAIRED_WIDTH:
        found = _paired(prefills, decodes, demand, policy)
    return found


def _cost(entry: tuple[float, WorkerView]) -> float:
    return entry[0]


def _paired(
    prefills: list[tuple[float, WorkerView]], decodes: list[tuple[float, WorkerView]], demand: Demand, policy: Policy
) -> list[Scored]:
    return [
        Scored(prefill_cost + decode_cost + sum(policy.joint_terms(prefill, decode, demand)), "split", prefill, decode)
        for prefill_cost, prefill in prefills
        for decode_cost, decode in decodes
        if not pair_refusal(prefill, decode, demand)
    ]


def last_resorts(snapshot: FleetSnapshot, demand: Demand, policy: Policy) -> list[Scored]:
    """Every worker that could serve alone, whatever its roles."""
    return [
        Scored(alone_score(view, demand, policy), "last_resort", view, view)
        for view in snapshot.workers
        if not alone_refusal(view, demand)
    ]


def alone_score(view: WorkerView, demand: Demand, policy: Policy) -> float:
    return (
        sum(policy.prefill_terms(view, demand))
        + sum(policy.decode_terms(view, demand))
        + sum(policy.joint_terms(view, view, demand))
    )


def alone_refusal(view: WorkerView, demand: Demand) -> str:
    return worker_refusal(view, demand) or prefill_refusal(view, demand) or decode_refusal(view, demand)


def _pick(candidates: list[Scored], demand: Demand, rng: Random) -> Outcome:
    drawn, equals = _draw(candidates, rng)
    reason = "only" if len(candidates) == 1 else "tie" if equals > 1 else "best"
    return Outcome(_as_pick(drawn, demand), reason)


def _draw(candidates: list[Scored], rng: Random) -> tuple[Scored, int]:
    """One of the best within epsilon, and how many those were."""
    limit = min(candidate.score for candidate in candidates) + EPSILON
    equals = [candidate for candidate in candidates if candidate.score <= limit]
    return (equals[0] if len(equals) == 1 else equals[rng.randrange(len(equals))]), len(equals)


def _as_pick(scored: Scored, demand: Demand) -> Pick:
    transport = common_transport(scored.prefill, scored.decode, demand) if scored.kind == "split" else ""
    return Pick(scored.kind, scored.prefill.worker_id, scored.decode.worker_id, transport)


def _shortage(sides: Sides) -> Shortage:
    """Why nobody serves. Waiting helps only where everything else is there."""
    for passed, refusals, absent in (
        (sides.decode, sides.decode_refusals, "no_decode"),
        (sides.prefill, sides.prefill_refusals, "no_prefill"),
    ):
        if passed or refusals & CAPACITY:
            continue
        if refusals & NEVER:
            return "too_long"
        return "no_decode" if absent == "no_decode" else "no_prefill"
    # Both sides have somebody, now or later; with both free now, it is the pairs that do not fit together.
    return "no_prefill" if sides.decode and sides.prefill else "capacity"


def _last_shortage(snapshot: FleetSnapshot, demand: Demand, short: Shortage) -> Shortage:
    """After the last resort failed too: somebody may have room later, or never."""
    refusals = {alone_refusal(view, demand) for view in snapshot.workers}
    if refusals & CAPACITY:
        return "capacity"
    return "too_long" if refusals & NEVER else short


def _forced(snapshot: FleetSnapshot, demand: Demand) -> Outcome:
    """The route's own workers or nobody."""
    route = demand.route
    assert route is not None
    views = {view.worker_id: view for view in snapshot.workers}
    decode = views.get(route.decode_worker)
    if decode is None:
        return Outcome(None, "no_decode", "no_decode")
    if route.prefill_worker in ("", route.decode_worker):
        refusal = alone_refusal(decode, demand)
        return _forced_outcome(refusal, Pick("local", decode.worker_id, decode.worker_id, ""), "no_decode")
    prefill = views.get(route.prefill_worker)
    if prefill is None:
        return Outcome(None, "no_prefill", "no_prefill")
    pick = Pick("split", prefill.worker_id, decode.worker_id, common_transport(prefill, decode, demand))
    refusal = worker_refusal(decode, demand) or ("" if decode.decode else "role_not_held")
    if refusal := refusal or decode_refusal(decode, demand):
        return _forced_outcome(refusal, pick, "no_decode")
    refusal = worker_refusal(prefill, demand) or ("" if prefill.prefill else "role_not_held")
    refusal = refusal or prefill_refusal(prefill, demand) or pair_refusal(prefill, decode, demand)
    return _forced_outcome(refusal, pick, "no_prefill")


def _forced_outcome(refusal: str, pick: Pick, absent: Shortage) -> Outcome:
    if not refusal:
        return Outcome(pick, "forced")
    short: Shortage = "capacity" if refusal in CAPACITY else "too_long" if refusal in NEVER else absent
    return Outcome(None, refusal, short)
