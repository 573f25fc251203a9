"""Placement: filters, scores, picks, and the account given of them."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.placement.decision import Decision
from controller.placement.explain import Placed
from controller.placement.place import EPSILON, Outcome, place
from controller.placement.policies import POLICIES, policy_named
from controller.placement.snapshot import Demand, FleetSnapshot, WorkerView
from controller.request import Route
from pdserve.errors import ConfigInvalid

POLICY = policy_named("least-loaded")
DEMAND = Demand(tokens=100, limit_tokens=200, choices=1)


def worker(name: str) -> WorkerView:
    """p… holds prefill, d… decode, b… both."""
    return WorkerView(
        worker_id=name, ready=True, draining=False, stalled=False, prefill=name[0] in "pb", decode=name[0] in "db",
        identity=b"i", transports=("tcp", "ucx"), max_context_tokens=4096, block_tokens=16, blocks_total=100,
        blocks_free=100, pending_prefill_tokens=0, sequences=0, max_batch=8, token_budget=2048,
    )  # fmt: skip


def placed(*workers: WorkerView, demand: Demand = DEMAND, seed: int = 0) -> Outcome:
    return place(FleetSnapshot(workers), demand, POLICY, Random(seed))


def names(outcome: Outcome) -> tuple[str, str, str]:
    assert outcome.pick is not None, outcome
    return outcome.pick.kind, outcome.pick.prefill_worker, outcome.pick.decode_worker


def explained(*workers: WorkerView, demand: Demand = DEMAND) -> Decision:
    snapshot = FleetSnapshot(workers)
    outcome = place(snapshot, demand, POLICY, Random(0))
    return Placed(snapshot, demand, "least-loaded", POLICY, outcome, 1, 0.5).decision()


def test_a_pair_is_taken_over_the_best_common_transport() -> None:
    outcome = placed(worker("p0"), worker("d0"))
    assert names(outcome) == ("split", "p0", "d0")
    assert outcome.reason == "only"
    assert outcome.pick is not None
    assert outcome.pick.transport == "ucx"
    tcp_only = replace(worker("d0"), transports=("tcp",))
    outcome = placed(worker("p0"), tcp_only)
    assert outcome.pick is not None
    assert outcome.pick.transport == "tcp"


def test_the_least_loaded_of_each_side_wins() -> None:
    busy_prefill = replace(worker("p0"), pending_prefill_tokens=500)
    busy_decode = replace(worker("d0"), sequences=3)
    full_decode = replace(worker("d1"), blocks_free=20)
    outcome = placed(busy_prefill, worker("p1"), busy_decode, full_decode, worker("d2"))
    assert names(outcome) == ("split", "p1", "d2")
    assert outcome.reason == "best"


def test_equals_are_drawn_at_random_with_the_given_rng() -> None:
    workers = [worker(name) for name in ("p0", "p1", "d0", "d1")]
    picks = {names(placed(*workers, seed=seed)) for seed in range(50)}
    assert len(picks) == 4
    assert placed(*workers, seed=7) == placed(*workers, seed=7)
    assert placed(*workers).reason == "tie"


ONE_TOKEN = Demand(tokens=100, limit_tokens=101, choices=1)


def test_one_token_is_computed_where_the_prompt_is_and_nothing_is_handed_over() -> None:
    busy = replace(worker("p0"), pending_prefill_tokens=500)
    assert names(placed(busy, worker("p1"), worker("d0"), demand=ONE_TOKEN)) == ("local", "p1", "p1")
    assert names(placed(worker("p0"), worker("d0"), demand=DEMAND)) == ("split", "p0", "d0")
    (local, *refused) = explained(worker("p0"), worker("d0"), demand=ONE_TOKEN).candidates
    assert (local.kind, local.prefill_worker, local.refusal) == ("local", "p0", "")
    assert {each.refusal for each in refused} == {"role_not_held"}


def test_one_token_waits_for_a_prefill_worker_that_is_full_rather_than_go_to_one_that_decodes() -> None:
    full = replace(worker("p0"), pending_prefill_tokens=100_000)
    outcome = placed(full, worker("d0"), demand=ONE_TOKEN)
    assert outcome.pick is None
    assert outcome.shortage == "capacity"


def test_a_worker_with_both_roles_serves_alone_while_it_is_idle() -> None:
    assert names(placed(worker("b0"), worker("p0"), worker("d0")))[0] == "local"
    decoding = replace(worker("b0"), sequences=6)
    assert names(placed(decoding, worker("p0"), worker("d0"))) == ("split", "p0", "d0")


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"ready": False}, "not_ready"),
        ({"ready": False, "draining": True}, "draining"),
        ({"draining": True}, "draining"),
        ({"stalled": True}, "stalled"),
        ({"max_context_tokens": 150}, "context_limit"),
        ({"sequences": 8}, "batch_full"),
        ({"blocks_free": 6}, "no_free_blocks"),
        ({"blocks_total": 5, "blocks_free": 5}, "pool_too_small"),
        ({"decode": False}, "role_not_held"),
        ({"transports": ("inproc",)}, "no_common_transport"),
        ({"identity": b"other"}, "identity_mismatch"),
    ],
)
def test_every_refusal_is_named_and_explained(change: dict[str, object], refusal: str) -> None:
    refused = replace(worker("d0"), **change)  # type: ignore[arg-type]
    assert names(placed(worker("p0"), refused, worker("d1"))) == ("split", "p0", "d1")
    decision = explained(worker("p0"), refused, worker("d1"))
    told = [each for each in decision.candidates if each.decode_worker == "d0" and each.refusal]
    assert [each.refusal for each in told] == [refusal]
    assert told[0].message
    assert told[0].score is None


def test_a_prefill_worker_with_a_long_queue_of_its_own_gets_no_more() -> None:
    outcome = placed(replace(worker("p0"), pending_prefill_tokens=4 * 2048), worker("d0"))
    assert outcome.shortage == "capacity"


def test_what_is_short_says_whether_waiting_helps() -> None:
    full = replace(worker("d0"), blocks_free=0)
    assert placed(worker("p0"), full).shortage == "capacity"
    assert placed().shortage == "no_decode"
    assert placed(replace(worker("d0"), ready=False), replace(worker("p0"), ready=False)).shortage == "no_decode"
    small = replace(worker("b0"), max_context_tokens=10)
    assert placed(small).shortage == "too_long"
    refused = replace(DEMAND, refused_now=frozenset({"d0"}))
    assert placed(worker("p0"), worker("d0"), demand=refused).shortage == "capacity"


def test_a_prompt_that_a_worker_died_with_keeps_away_from_another_one() -> None:
    suspect = replace(DEMAND, suspect=True)
    taken = replace(worker("p0"), suspects=1)
    assert names(placed(taken, worker("p1"), worker("d0"), demand=suspect)) == ("split", "p1", "d0")
    assert placed(taken, worker("d0"), demand=suspect).shortage == "capacity"
    assert placed(replace(worker("b0"), suspects=1), demand=suspect).shortage == "capacity"
    assert names(placed(taken, worker("d0"))) == ("split", "p0", "d0")
    refusals = {each.refusal for each in explained(taken, worker("d0"), demand=suspect).candidates}
    assert "suspect_there" in refusals


@pytest.mark.parametrize("left", ["p0", "d0"])
def test_with_one_pool_empty_the_other_serves_alone(left: str) -> None:
    outcome = placed(worker(left), replace(worker("d1" if left == "p0" else "p1"), ready=False))
    assert names(outcome) == ("last_resort", left, left)
    decision = explained(worker(left))
    assert decision.reason == "last_resort"
    alone = [each for each in decision.candidates if each.kind == "last_resort"]
    assert alone[0].score == pytest.approx(sum(alone[0].terms.values()))


def test_a_full_pool_is_not_an_empty_one() -> None:
    assert placed(worker("p0"), replace(worker("d0"), sequences=8)).shortage == "capacity"


def test_a_pair_that_failed_is_not_tried_again() -> None:
    demand = replace(DEMAND, bad_pairs=frozenset({("p0", "d0")}))
    assert names(placed(worker("p0"), worker("d0"), worker("d1"), demand=demand)) == ("split", "p0", "d1")
    assert names(placed(worker("p0"), worker("d0"), demand=demand))[0] == "last_resort"


def test_a_forced_route_is_followed_or_nobody_serves() -> None:
    workers = [worker(name) for name in ("p0", "p1", "d0", "d1")]
    forced = replace(DEMAND, route=Route("p1", "d1"), transport="tcp")
    outcome = placed(*workers, demand=forced)
    assert names(outcome) == ("split", "p1", "d1")
    assert outcome.reason == "forced"
    local = replace(DEMAND, route=Route("", "d0"))
    assert names(placed(*workers, demand=local)) == ("local", "d0", "d0")
    assert placed(worker("p0"), demand=forced).shortage == "no_decode"
    inproc = replace(forced, transport="inproc")
    assert placed(*workers, demand=inproc).reason == "no_common_transport"


def test_a_pair_that_fits_is_found_behind_many_that_do_not() -> None:
    crowd = [replace(worker(f"d{number}"), identity=b"other") for number in range(20)]
    fitting = replace(worker("d99"), sequences=5)
    assert names(placed(worker("p0"), *crowd, fitting)) == ("split", "p0", "d99")


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigInvalid, match="least-loaded"):
        policy_named("best")
    assert set(POLICIES) == {"least-loaded"}


_WORKERS = st.builds(
    WorkerView,
    worker_id=st.uuids().map(str), ready=st.booleans(), draining=st.booleans(), stalled=st.booleans(),
    prefill=st.booleans(), decode=st.booleans(), identity=st.sampled_from([b"i", b"j"]),
    transports=st.sampled_from([("tcp",), ("ucx", "tcp"), ()]), max_context_tokens=st.sampled_from([100, 4096]),
    block_tokens=st.sampled_from([16, 32]), blocks_total=st.integers(1, 50), blocks_free=st.integers(0, 50),
    pending_prefill_tokens=st.integers(0, 10000), sequences=st.integers(0, 10), max_batch=st.integers(1, 10),
    token_budget=st.sampled_from([512, 2048]),
)  # fmt: skip


@given(
    st.lists(_WORKERS, max_size=12),
    st.integers(1, 400),
    st.sampled_from([1, 20]),
    st.integers(1, 4),
    st.integers(0, 5),
)
def test_nobody_is_picked_who_was_refused_and_nobody_better_was_passed_over(
    workers: list[WorkerView], tokens: int, wanted: int, choices: int, seed: int
) -> None:
    demand = Demand(tokens, tokens + wanted, choices)
    snapshot = FleetSnapshot(tuple(workers))
    outcome = place(snapshot, demand, POLICY, Random(seed))
    assert (outcome.pick is None) == (outcome.shortage is not None)
    decision = Placed(snapshot, demand, "least-loaded", POLICY, outcome, 1, 0.0).decision()
    if outcome.pick is None:
        return
    pick = outcome.pick
    by_id = {view.worker_id: view for view in workers}
    for name in (pick.prefill_worker, pick.decode_worker):
        view = by_id[name]
        assert view.ready
        assert not view.draining
        assert not view.stalled
    kinds = ("last_resort",) if pick.kind == "last_resort" else ("split", "local")
    scored = [each for each in decision.candidates if each.score is not None and each.kind in kinds]
    mine = next(
        each for each in scored
        if (each.prefill_worker, each.decode_worker) == (pick.prefill_worker, pick.decode_worker)
    )  # fmt: skip
    assert mine.score is not None
    assert mine.score == pytest.approx(sum(mine.terms.values()))
    assert mine.score <= min(each.score for each in scored if each.score is not None) + EPSILON
