"""The controller's picture of what workers hold: right after any order of events, honest about gaps, and used by placement."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.kv_holdings import KvHoldings
from controller.kv_prices import GUESSED_SHARE, KvPrices
from controller.placement.snapshot import NO_REUSE, Reuse
from kv_transfer.keys import chain_hashes
from pdserve.v1 import worker_pb2
from tests.controller.placement.test_place import DEMAND, explained, names, placed, worker

STORED, EVICTED, CLEARED = (
    worker_pb2.KvEvent.KIND_STORED,
    worker_pb2.KvEvent.KIND_EVICTED,
    worker_pb2.KvEvent.KIND_CLEARED,
)
KEYS = chain_hashes(bytes(32), bytes(4 * 16 * 12))


def key(unit: int) -> bytes:
    return KEYS[unit * 32 : unit * 32 + 32]


def message(first: int, *events: tuple[int, bytes, str]) -> worker_pb2.KvEvents:
    made = [worker_pb2.KvEvent(kind=kind, block_hashes=hashes, tier=tier) for kind, hashes, tier in events]  # type: ignore[arg-type]
    return worker_pb2.KvEvents(first_sequence=first, events=made)


def told(*events: tuple[int, bytes, str]) -> KvHoldings:
    holdings = KvHoldings()
    assert holdings.apply(message(1, (CLEARED, b"", ""), *events))
    return holdings


def test_a_prompt_is_on_the_device_first_and_in_any_tier_after_that() -> None:
    holdings = told(
        (STORED, KEYS[: 3 * 32], "device"), (STORED, KEYS[: 5 * 32], "host"), (STORED, KEYS[5 * 32 : 7 * 32], "disk")
    )
    assert holdings.reuse(KEYS) == Reuse(device_tokens=48, stored_tokens=64, load_cost_tokens=64 * GUESSED_SHARE)
    assert holdings.reuse(chain_hashes(b"other", bytes(4 * 16 * 3))) == NO_REUSE
    assert holdings.units() == {"device": 3, "host": 5, "disk": 2}


def test_a_missing_message_is_noticed_and_a_snapshot_heals_it() -> None:
    holdings = told((STORED, key(0), "device"))
    assert not holdings.apply(message(9, (STORED, key(1), "device")))
    assert holdings.apply(message(20, (CLEARED, b"", ""), (STORED, key(2), "device")))
    assert holdings.units() == {"device": 1}
    assert holdings.apply(message(22, (EVICTED, key(2), "device")))
    assert holdings.units() == {}


@given(st.lists(st.tuples(st.sampled_from([STORED, EVICTED]), st.integers(0, 11), st.sampled_from(["device", "host"]))))
def test_any_events_leave_what_a_set_would_hold(events: list[tuple[int, int, str]]) -> None:
    holdings, sets = told(), {"device": set[int](), "host": set[int]()}
    for sequence, (kind, unit, tier) in enumerate(events, start=2):
        assert holdings.apply(message(sequence, (kind, key(unit), tier)))
        (sets[tier].add if kind == STORED else sets[tier].discard)(unit)
    assert holdings.units() == {tier: len(units) for tier, units in sets.items() if units}


@given(device=st.integers(0, 12), anywhere=st.integers(0, 12))
def test_the_length_of_a_held_prefix_is_found(device: int, anywhere: int) -> None:
    anywhere = max(device, anywhere)
    holdings = told((STORED, KEYS[: device * 32], "device"), (STORED, KEYS[: anywhere * 32], "disk"))
    stored = (anywhere - device) * 16
    assert holdings.reuse(KEYS) == Reuse(device * 16, stored, stored * GUESSED_SHARE)


def test_each_part_of_a_prompt_is_loaded_from_the_nearest_tier_at_the_price_of_that_tier() -> None:
    holdings = told(
        (STORED, KEYS[: 2 * 32], "device"), (STORED, KEYS[: 5 * 32], "host"), (STORED, KEYS[: 9 * 32], "disk"),
        (STORED, KEYS[: 10 * 32], "tape"),
    )  # fmt: skip
    reuse = holdings.reuse(KEYS, KvPrices({"host": 0.01, "disk": 0.5}))
    assert (reuse.device_tokens, reuse.stored_tokens) == (32, 8 * 16)
    assert reuse.load_cost_tokens == pytest.approx(16 * (3 * 0.01 + 4 * 0.5 + GUESSED_SHARE))


def test_the_worker_that_holds_the_prompt_is_preferred_until_its_queue_is_longer() -> None:
    demand = replace(DEMAND, tokens=1000, limit_tokens=1100, reuse={"p1": Reuse(device_tokens=900)})
    assert names(placed(worker("p0"), worker("p1"), worker("d0"), demand=demand))[1] == "p1"
    busy = replace(worker("p1"), pending_prefill_tokens=1500)
    assert names(placed(worker("p0"), busy, worker("d0"), demand=demand))[1] == "p0"


def test_a_device_beats_a_tier_and_a_tier_beats_computing() -> None:
    reuse = {"p0": Reuse(stored_tokens=900, load_cost_tokens=90.0), "p1": Reuse(device_tokens=900)}
    demand = replace(DEMAND, tokens=1000, limit_tokens=1100, reuse=reuse)
    assert names(placed(worker("p0"), worker("p1"), worker("d0"), demand=demand))[1] == "p1"
    assert names(placed(worker("p0"), worker("p2"), worker("d0"), demand=demand))[1] == "p0"
    decision = explained(worker("p0"), worker("p2"), worker("d0"), demand=demand)
    assert decision.candidates[0].terms["load"] > 0
    assert decision.candidates[0].terms["prefill"] < decision.candidates[1].terms["prefill"]


def test_a_tier_that_was_measured_to_be_slow_counts_for_less_than_a_fast_one() -> None:
    reuse = {
        "p0": Reuse(stored_tokens=900, load_cost_tokens=800.0),
        "p1": Reuse(stored_tokens=600, load_cost_tokens=6.0),
    }
    demand = replace(DEMAND, tokens=1000, limit_tokens=1100, reuse=reuse)
    assert names(placed(worker("p0"), worker("p1"), worker("d0"), demand=demand))[1] == "p1"


def test_a_decode_worker_that_holds_chunks_of_a_blended_prompt_receives_all_of_it() -> None:
    demand = replace(DEMAND, tokens=1400, limit_tokens=1500, reuse={"d1": Reuse(device_tokens=1300)}, reused="chunks")
    hand_offs = {
        each.decode_worker: each.terms["hand_off"]
        for each in explained(worker("p0"), worker("d0"), worker("d1"), demand=demand).candidates
        if each.terms
    }
    assert hand_offs["d0"] == hand_offs["d1"]


def test_a_decode_worker_that_holds_the_prompt_has_less_to_receive() -> None:
    demand = replace(DEMAND, tokens=1400, limit_tokens=1500, reuse={"d1": Reuse(device_tokens=1300)})
    assert names(placed(worker("p0"), worker("d0"), worker("d1"), demand=demand))[2] == "d1"
