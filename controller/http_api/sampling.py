"""Owns how a body's sampling fields are resolved into a SamplingSpec: defaults, bounds by context and vocabulary, the seed. Pure.

The defaults are OpenAI's (temperature 1, completions 16 tokens, chats the rest of the context); generation_config.json does not
change them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from controller.http_api.bodies import ChatBody, CompletionBody, SamplingBody
from controller.request import SamplingSpec
from pdserve.errors import InvalidRequest, PromptTooLong

COMPLETION_MAX_TOKENS = 16
UINT64 = 2**64

MintSeed = Callable[[], int]


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the model and the server."""

    context_tokens: int
    vocab_size: int
    max_choices: int


@dataclass(frozen=True, slots=True)
class Asked:
    """What the endpoints name differently. `max_tokens` None = the default, which gives way to the context."""

    max_tokens: int | None
    default_max_tokens: int | None  # None = the rest of the context
    max_tokens_param: str
    prompt_param: str
    logprobs: int | None
    prompt_logprobs: int | None = None


def asked_of_completion(body: CompletionBody) -> Asked:
    """echo with max_tokens 0 draws one token, which is not shown: prompts are scored that way."""
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("max_tokens: must be at least 1; 0 is for echo only.", param="max_tokens")
    max_tokens = 1 if body.max_tokens == 0 else body.max_tokens
    prompt_logprobs = body.logprobs if body.echo else None
    return Asked(max_tokens, COMPLETION_MAX_TOKENS, "max_tokens", "prompt", body.logprobs, prompt_logprobs)


def asked_of_chat(body: ChatBody) -> Asked:
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs: can only be given with logprobs: true.", param="top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if body.max_completion_tokens is not None:
        return Asked(body.max_completion_tokens, None, "max_completion_tokens", "messages", logprobs)
    return Asked(body.max_tokens, None, "max_tokens", "messages", logprobs)


def check_counts(body: SamplingBody, prompts: int, limits: Limits) -> int:
    """The resolved n. Raises InvalidRequest for too many choices or prompts, or options that do not go together."""
    n = body.n if body.n is not None else 1
    if n > limits.max_choices:
        raise InvalidRequest(f"n: at most {limits.max_choices} choices are allowed here.", param="n")
    if prompts > limits.max_choices:
        raise InvalidRequest(
            f"prompt: at most {limits.max_choices} prompts are allowed in one request; send them in several.",
            param="prompt",
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options: can only be given with stream: true.", param="stream_options")
    return n


def resolve(body: SamplingBody, asked: Asked, prompt_tokens: int, limits: Limits, mint_seed: MintSeed) -> SamplingSpec:
    """Raises PromptTooLong where prompt + max_tokens exceed the context, InvalidRequest for ids outside the vocabulary."""
    _check_vocabulary([token for token, _ in body.logit_bias], limits.vocab_size, "logit_bias")
    _check_vocabulary(body.stop_token_ids or [], limits.vocab_size, "stop_token_ids")
    max_tokens = _max_tokens(asked, prompt_tokens, limits.context_tokens)
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens: {min_tokens} is more than max_tokens, {max_tokens}.", param="min_tokens")
    return SamplingSpec(
        max_tokens=max_tokens,
        seed=mint_seed() if body.seed is None else body.seed % UINT64,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(body.top_k or 0, 0),
        min_p=_or(body.min_p, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        logit_bias=body.logit_bias,
        min_tokens=min_tokens,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(dict.fromkeys(body.stop_token_ids or ())),
        logprobs=asked.logprobs,
        prompt_logprobs=asked.prompt_logprobs,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _max_tokens(asked: Asked, prompt_tokens: int, context_tokens: int) -> int:
    room = context_tokens - prompt_tokens
    if room < 1:
        raise PromptTooLong.of(prompt_tokens + 1, context_tokens, param=asked.prompt_param)
    if asked.max_tokens is None:
        return room if asked.default_max_tokens is None else min(asked.default_max_tokens, room)
    if asked.max_tokens > room:
        raise PromptTooLong.of(prompt_tokens + asked.max_tokens, context_tokens, param=asked.max_tokens_param)
    return asked.max_tokens


def _check_vocabulary(ids: Sequence[int], vocab_size: int, param: str) -> None:
    for token in ids:
        if token >= vocab_size:
            raise InvalidRequest(
                f"{param}: token id {token} is outside the vocabulary: ids go from 0 to {vocab_size - 1}.", param=param
            )
