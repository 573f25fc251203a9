"""The bounds of what a controller may send, and the round trip of sampling parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.errors import InvalidRequest
from pdserve.v1 import types_pb2, worker_pb2
from tests.worker import commands
from worker_runtime.messages import (
    MAX_CHOICES,
    MAX_LIST_ITEMS,
    sampling_from_proto,
    sampling_to_proto,
    work_from_proto,
)

BREAKAGES: dict[str, Callable[[worker_pb2.Work], object]] = {
    "no dispatch": lambda work: work.ClearField("dispatch"),
    "the attempt of a pull": lambda work: setattr(work.dispatch, "attempt", 0),
    "a source without an address": lambda work: setattr(work.source, "worker_id", "w0"),
    "no choice": lambda work: work.ClearField("choices"),
    "a choice twice": lambda work: work.choices.extend([0]),
    "too many choices": lambda work: work.choices.extend(range(1, MAX_CHOICES + 1)),
    "no token": lambda work: work.ClearField("token_ids"),
    "half a token": lambda work: setattr(work, "token_ids", work.token_ids[:-1]),
    "no prompt": lambda work: setattr(work, "prompt_tokens", 0),
    "a prompt beyond the tokens": lambda work: setattr(work, "prompt_tokens", 41),
    "half a hash": lambda work: setattr(work, "block_hashes", work.block_hashes[:-1]),
    "more hashes than units": lambda work: setattr(work, "block_hashes", work.block_hashes * 2),
    "no seed": lambda work: work.sampling.ClearField("seed"),
    "no max_tokens": lambda work: work.sampling.ClearField("max_tokens"),
    "a long bias": lambda work: work.sampling.logit_bias.update(dict.fromkeys(range(MAX_LIST_ITEMS + 1), 1.0)),
    "many stop ids": lambda work: work.sampling.stop_token_ids.extend(range(MAX_LIST_ITEMS + 1)),
    "many logprobs": lambda work: setattr(work.sampling, "logprobs", 5000),
    "a long name": lambda work: setattr(work, "request_id", "x" * 257),
}


@pytest.mark.parametrize("breakage", BREAKAGES.values(), ids=BREAKAGES.keys())
def test_malformed_work_is_refused(breakage: Callable[[worker_pb2.Work], object]) -> None:
    work = commands.work(1, range(40))
    assert len(work_from_proto(work).token_ids) == 160
    breakage(work)
    with pytest.raises(InvalidRequest):
        work_from_proto(work)


single = st.floats(-100, 100, width=32)


@given(
    st.builds(
        types_pb2.SamplingParams,
        temperature=st.none() | single,
        top_p=st.none() | single,
        top_k=st.integers(0, 1000),
        repetition_penalty=st.none() | single,
        logit_bias=st.dictionaries(st.integers(0, 1000), single, max_size=5),
        seed=st.integers(0, 2**64 - 1),
        max_tokens=st.integers(0, 2**32 - 1),
        stop_token_ids=st.lists(st.integers(0, 1000), max_size=5),
        logprobs=st.none() | st.integers(0, 20),
        prompt_logprobs=st.none() | st.integers(0, 20),
    )
)
def test_sampling_parameters_survive_the_way_there_and_back(message: types_pb2.SamplingParams) -> None:
    sampling = sampling_from_proto(message)
    assert sampling_from_proto(sampling_to_proto(sampling)) == sampling
    assert (sampling.temperature == 1.0) or message.HasField("temperature")
    assert (sampling.logprobs is None) == (not message.HasField("logprobs"))
