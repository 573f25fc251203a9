"""Owns the translation of a gRPC GenerateRequest into a GenerationRequest: bounds, defaults, the seed. Pure.

A seed that the caller left out is made from the request id, so that a request that is computed again, by another controller after
the death of this one, draws the same tokens.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from controller.blend_request import blend_of
from controller.kv_blend import KvBlend, check_prompt_logprobs
from controller.request import GenerationRequest, Route, SamplingSpec
from pdserve.errors import InvalidRequest, ModelNotFound, PromptTooLong
from pdserve.v1 import inference_pb2, types_pb2

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 128
MAX_LOGIT_BIAS = 4096
MAX_LOGPROBS = 20
MAX_SALT_CHARS = 1024
LINGER_S = 3.0  # time in which an SDK that lost its stream can resume it
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True, slots=True)
class GenerateLimits:
    model: str
    context_tokens: int
    vocab_size: int
    max_choices: int


def check_head(message: inference_pb2.GenerateRequest, limits: GenerateLimits) -> None:
    """What can be refused before the prompt is tokenised."""
    if message.model and message.model != limits.model:
        raise ModelNotFound(
            f"The model {message.model[:200]!r} is not served here; {limits.model!r} is.", param="model"
        )
    if message.request_id and not _REQUEST_ID.fullmatch(message.request_id):
        raise _invalid("request_id", "must match [A-Za-z0-9._-]{1,128}")
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise _invalid("prompt", "is missing: give text or token_ids")
    if kind == "token_ids" and (not message.token_ids or len(message.token_ids) % 4):
        raise _invalid("token_ids", "must be little-endian int32 values, at least one")


def generation_request(
    message: inference_pb2.GenerateRequest,
    request_id: str,
    token_ids: bytes,
    limits: GenerateLimits,
    timeout_s: float | None,
) -> GenerationRequest:
    """Raises InvalidRequest, PromptTooLong."""
    n = message.n or 1
    if n > limits.max_choices:
        raise _invalid("n", f"at most {limits.max_choices} choices are allowed here")
    _check_stops(message.stop)
    if len(message.cache_salt) > MAX_SALT_CHARS:
        raise _invalid("cache_salt", f"at most {MAX_SALT_CHARS} characters are allowed")
    if len(message.next_index) > n:
        raise _invalid("next_index", "has more entries than there are choices")
    _check_ids(memoryview(token_ids).cast("i"), limits.vocab_size, "token_ids")
    return GenerationRequest(
        request_id=request_id,
        token_ids=token_ids,
        sampling=_sampling(message.sampling, request_id, len(token_ids) // 4, limits),
        n=n,
        stop=tuple(dict.fromkeys(message.stop)),
        include_stop_text=message.include_stop_text,
        want_text=not message.skip_text,
        cache_salt=message.cache_salt,
        priority=message.priority,
        timeout_s=timeout_s,
        route=_route(message),
        next_index=tuple(message.next_index),
        linger_s=LINGER_S if message.request_id else 0.0,
        kv_blend=_blend(message, token_ids),
    )


def _blend(message: inference_pb2.GenerateRequest, token_ids: bytes) -> KvBlend | None:
    if not message.HasField("kv_blend"):
        return None
    check_prompt_logprobs(message.sampling.prompt_logprobs if message.sampling.HasField("prompt_logprobs") else None)
    return blend_of(message.kv_blend, token_ids)


def _route(message: inference_pb2.GenerateRequest) -> Route | None:
    if not message.HasField("route"):
        return None
    route = message.route
    # Only one of them named = undisaggregated there.
    return Route(route.prefill_worker, route.decode_worker or route.prefill_worker, route.transport)


def _sampling(
    message: types_pb2.SamplingParams, request_id: str, prompt_tokens: int, limits: GenerateLimits
) -> SamplingSpec:
    max_tokens = _max_tokens(message, prompt_tokens, limits.context_tokens)
    if message.min_tokens > max_tokens:
        raise _invalid("min_tokens", f"{message.min_tokens} is more than max_tokens, {max_tokens}")
    _check_lists(message, limits.vocab_size)
    return SamplingSpec(
        max_tokens=max_tokens,
        seed=message.seed if message.HasField("seed") else minted_seed(request_id),
        temperature=_within(message.temperature if message.HasField("temperature") else 1.0, 0, 100, "temperature"),
        top_p=_above_zero(message.top_p if message.HasField("top_p") else 1.0, 1, "top_p"),
        top_k=max(0, message.top_k),
        min_p=_within(message.min_p, 0, 1, "min_p"),
        repetition_penalty=_above_zero(
            message.repetition_penalty if message.HasField("repetition_penalty") else 1.0, 100, "repetition_penalty"
        ),
        presence_penalty=_within(message.presence_penalty, -2, 2, "presence_penalty"),
        frequency_penalty=_within(message.frequency_penalty, -2, 2, "frequency_penalty"),
        logit_bias=tuple(sorted(message.logit_bias.items())),
        min_tokens=message.min_tokens,
        ignore_eos=message.ignore_eos,
        stop_token_ids=tuple(dict.fromkeys(message.stop_token_ids)),
        logprobs=_alternatives(message.logprobs if message.HasField("logprobs") else None, "logprobs"),
        prompt_logprobs=_alternatives(
            message.prompt_logprobs if message.HasField("prompt_logprobs") else None, "prompt_logprobs"
        ),
    )


def minted_seed(request_id: str) -> int:
    return int.from_bytes(hashlib.sha256(b"pdserve-seed" + request_id.encode()).digest()[:8], "little")


def _max_tokens(message: types_pb2.SamplingParams, prompt_tokens: int, context_tokens: int) -> int:
    """Absent = the rest of the context."""
    room = context_tokens - prompt_tokens
    if room < 1:
        raise PromptTooLong.of(prompt_tokens + 1, context_tokens)
    if not message.HasField("max_tokens"):
        return room
    if message.max_tokens < 1:
        raise _invalid("max_tokens", "must be at least 1")
    if message.max_tokens > room:
        raise PromptTooLong.of(prompt_tokens + message.max_tokens, context_tokens, param="max_tokens")
    return message.max_tokens


def _above_zero(value: float, high: float, param: str) -> float:
    if value <= 0:
        raise _invalid(param, "must be above 0")
    return _within(value, 0, high, param)


def _alternatives(count: int | None, param: str) -> int | None:
    if count is not None and count > MAX_LOGPROBS:
        raise _invalid(param, f"at most {MAX_LOGPROBS} alternatives are given")
    return count


def _check_stops(stops: Sequence[str]) -> None:
    if len(stops) > MAX_STOPS:
        raise _invalid("stop", f"at most {MAX_STOPS} stop strings are allowed")
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise _invalid("stop", f"each must have 1 to {MAX_STOP_CHARS} characters")


def _check_lists(message: types_pb2.SamplingParams, vocab_size: int) -> None:
    if len(message.stop_token_ids) > MAX_STOP_IDS:
        raise _invalid("stop_token_ids", f"at most {MAX_STOP_IDS} ids are allowed")
    if len(message.logit_bias) > MAX_LOGIT_BIAS:
        raise _invalid("logit_bias", f"at most {MAX_LOGIT_BIAS} entries are allowed")
    _check_ids(message.stop_token_ids, vocab_size, "stop_token_ids")
    _check_ids(list(message.logit_bias), vocab_size, "logit_bias")
    for bias in message.logit_bias.values():
        _within(bias, -100, 100, "logit_bias")


def _check_ids(ids: Sequence[int] | memoryview, vocab_size: int, param: str) -> None:
    if len(ids) and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(token for token in _each(ids) if not 0 <= token < vocab_size)
        raise _invalid(param, f"token id {wrong} is outside the vocabulary: ids go from 0 to {vocab_size - 1}")


def _each(ids: Iterable[int]) -> Iterable[int]:
    return ids


def _within(value: float, low: float, high: float, param: str) -> float:
    if not math.isfinite(value) or not low <= value <= high:
        raise _invalid(param, f"must lie between {low:g} and {high:g}")
    return value


def _invalid(param: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {what}.", param=param)
