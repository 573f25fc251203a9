"""Admission and batching of the two roles, and what a worker with both makes of them."""

from __future__ import annotations

from array import array

import pytest

import decode_worker.admission
import decode_worker.batching
import prefill_worker.admission
import prefill_worker.batching
from engine.protocol import Dispatch, Load, Sampling, SetPolicy, Work
from pdserve.errors import InvalidRequest
from pdserve.v1 import types_pb2
from service_kit.config import EngineConfig
from worker_runtime.holding import Holding, roles_from_proto
from worker_runtime.roles import combined_policy

SAMPLING = Sampling(0.0, 1.0, 0, 0.0, 1.0, 0.0, 0.0, {}, 7, 8, 0, False, ())


def work(tokens: int = 100, choices: int = 1) -> Work:
    return Work(Dispatch(1, 1), "r", tuple(range(choices)), array("i", bytes(4 * tokens)).tobytes(), 1, SAMPLING, b"")


def load(waiting_tokens: int) -> Load:
    return Load(0, 1, 1, 0, 0, 0, 0, waiting_tokens, 0.0, 0, 0, 0, 0)


def test_prefill_is_taken_by_its_role_alone_and_not_while_draining() -> None:
    prefill, decode = Holding({"prefill"}), Holding({"decode"})
    assert prefill_worker.admission.refusal(work(), prefill, load(0), 100) is None
    assert prefill_worker.admission.refusal(work(), decode, load(0), 100) is not None
    prefill.drain()
    assert prefill_worker.admission.refusal(work(), prefill, load(0), 100) is not None


def test_a_worker_whose_engine_is_gone_takes_nothing_and_says_so() -> None:
    holding = Holding({"prefill", "decode"})
    holding.lose_engine()
    assert holding.draining
    refusals = [
        prefill_worker.admission.refusal(work(), holding, load(0), 100),
        decode_worker.admission.reserve_refusal(work(), holding, 0, 4),
        decode_worker.admission.generate_refusal(work(), holding, load(0), 100),
    ]
    assert [str(each) for each in refusals] == ["This worker's engine is gone."] * 3


def test_a_long_prompt_is_taken_where_none_waits_and_refused_behind_a_long_queue() -> None:
    holding = Holding({"prefill", "decode"})
    for refusal in (prefill_worker.admission.refusal, decode_worker.admission.generate_refusal):
        assert refusal(work(10_000), holding, load(0), 100) is None
        assert refusal(work(100), holding, load(6_300), 100) is None
        assert refusal(work(101), holding, load(6_300), 100) is not None


def test_reservations_are_bounded_by_two_batches_of_sequences() -> None:
    holding = Holding({"decode"})
    assert decode_worker.admission.reserve_refusal(work(choices=2), holding, 6, 4) is None
    assert decode_worker.admission.reserve_refusal(work(choices=3), holding, 6, 4) is not None
    assert decode_worker.admission.reserve_refusal(work(), Holding({"prefill"}), 0, 4) is not None


def test_the_decode_role_keeps_chunks_short_and_blocks_back() -> None:
    engine = EngineConfig(prefill_chunk=512, decode_headroom=0.05)
    assert prefill_worker.batching.policy(engine) == SetPolicy(2048, 256, 512, 0)
    assert decode_worker.batching.policy(engine, 1000) == SetPolicy(2048, 256, 128, 50)
    assert decode_worker.batching.policy(EngineConfig(prefill_chunk=0), 10).prefill_chunk == 0


def test_a_worker_with_both_roles_takes_the_shorter_chunks_and_the_larger_head_room() -> None:
    engine = EngineConfig()
    both = combined_policy([prefill_worker.batching.policy(engine), decode_worker.batching.policy(engine, 1000)])
    assert both == decode_worker.batching.policy(engine, 1000)
    unchunked = combined_policy([SetPolicy(10, 1, 0, 0), SetPolicy(20, 2, 8, 3)])
    assert unchunked == SetPolicy(20, 2, 8, 3)


@pytest.mark.parametrize("roles", [[], [types_pb2.ROLE_UNSPECIFIED]])
def test_roles_that_are_none_are_refused(roles: list[types_pb2.Role.ValueType]) -> None:
    with pytest.raises(InvalidRequest):
        roles_from_proto(roles)
