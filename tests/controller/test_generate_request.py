"""What a gRPC GenerateRequest may say, and what it means."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from controller.generate_request import GenerateLimits, check_head, generation_request, minted_seed
from controller.request import GenerationRequest, Route
from pdserve.errors import InvalidRequest, ModelNotFound, PdserveError, PromptTooLong
from pdserve.v1 import inference_pb2

LIMITS = GenerateLimits("tiny", 100, 256, 4)
IDS = b"".join(token.to_bytes(4, "little") for token in range(10))


def message() -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(model="tiny", token_ids=IDS)


def translated(changed: inference_pb2.GenerateRequest) -> GenerationRequest:
    check_head(changed, LIMITS)
    return generation_request(changed, changed.request_id or "made", changed.token_ids, LIMITS, 5.0)


def test_defaults_are_those_of_the_proto() -> None:
    request = translated(message())
    sampling = request.sampling
    assert (request.n, request.timeout_s, request.linger_s, request.want_text) == (1, 5.0, 0.0, True)
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty, sampling.max_tokens) == (1, 1, 1, 90)
    assert sampling.seed == minted_seed("made")
    assert sampling.logprobs is None
    assert request.route is None


def test_zero_values_that_were_set_are_kept() -> None:
    asked = message()
    asked.sampling.temperature = 0
    asked.sampling.seed = 0
    asked.sampling.logprobs = 0
    sampling = translated(asked).sampling
    assert (sampling.temperature, sampling.seed, sampling.logprobs) == (0, 0, 0)


def test_the_minted_seed_depends_on_the_request_id_alone() -> None:
    assert minted_seed("a") == minted_seed("a") != minted_seed("b")
    assert 0 <= minted_seed("a") < 2**64


def test_a_route_with_one_worker_is_undisaggregated() -> None:
    asked = message()
    asked.route.prefill_worker = "p0"
    assert translated(asked).route == Route("p0", "p0", "")


def test_a_named_request_lingers_for_its_caller() -> None:
    asked = message()
    asked.request_id = "mine"
    assert translated(asked).linger_s > 0


def _set(path: str, value: object) -> Callable[[inference_pb2.GenerateRequest], None]:
    def change(asked: inference_pb2.GenerateRequest) -> None:
        *parents, last = path.split(".")
        target: object = asked
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, last, value)

    return change


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        (_set("model", "other"), ModelNotFound, "model"),
        (_set("request_id", "no spaces"), InvalidRequest, "request_id"),
        (_set("token_ids", b""), InvalidRequest, "token_ids"),
        (_set("token_ids", b"abc"), InvalidRequest, "token_ids"),
        (_set("token_ids", b"\xff\xff\xff\xff"), InvalidRequest, "token_ids"),
        (_set("token_ids", b"\x00\x01\x00\x00"), InvalidRequest, "token_ids"),
        (_set("token_ids", IDS * 10), PromptTooLong, "prompt"),
        (_set("n", 5), InvalidRequest, "n"),
        (_set("cache_salt", "x" * 1025), InvalidRequest, "cache_salt"),
        (_set("sampling.max_tokens", 0), InvalidRequest, "max_tokens"),
        (_set("sampling.max_tokens", 91), PromptTooLong, "max_tokens"),
        (_set("sampling.temperature", -1.0), InvalidRequest, "temperature"),
        (_set("sampling.temperature", float("nan")), InvalidRequest, "temperature"),
        (_set("sampling.top_p", 1.5), InvalidRequest, "top_p"),
        (_set("sampling.min_p", -0.1), InvalidRequest, "min_p"),
        (_set("sampling.repetition_penalty", 0.0), InvalidRequest, "repetition_penalty"),
        (_set("sampling.presence_penalty", 3.0), InvalidRequest, "presence_penalty"),
        (_set("sampling.frequency_penalty", float("inf")), InvalidRequest, "frequency_penalty"),
        (_set("sampling.logprobs", 21), InvalidRequest, "logprobs"),
        (_set("sampling.prompt_logprobs", 21), InvalidRequest, "prompt_logprobs"),
        (_set("sampling.min_tokens", 91), InvalidRequest, "min_tokens"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(
    change: Callable[[inference_pb2.GenerateRequest], None], error: type[PdserveError], param: str
) -> None:
    asked = message()
    change(asked)
    with pytest.raises(error) as caught:
        translated(asked)
    assert caught.value.param == param


def test_lists_are_bounded() -> None:
    for name, values in (("stop", ["x"] * 17), ("stop", [""]), ("stop", ["x" * 1025]), ("next_index", [0, 0])):
        asked = message()
        getattr(asked, name).extend(values)
        with pytest.raises(InvalidRequest):
            translated(asked)
    asked = message()
    asked.sampling.stop_token_ids.extend(range(129))
    with pytest.raises(InvalidRequest):
        translated(asked)
    asked = message()
    asked.sampling.logit_bias[256] = 1.0
    with pytest.raises(InvalidRequest):
        translated(asked)
    asked.sampling.logit_bias.clear()
    asked.sampling.logit_bias[1] = 101.0
    with pytest.raises(InvalidRequest):
        translated(asked)


def test_a_missing_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        check_head(inference_pb2.GenerateRequest(), LIMITS)
