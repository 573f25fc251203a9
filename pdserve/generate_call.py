"""Owns one generation as seen by the SDK: the request message, what has arrived, whether to resume after a loss. No I/O."""

from __future__ import annotations

import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import grpc

from pdserve.errors import DeadlineExceeded, InternalError, InvalidRequest
from pdserve.generation import (
    Choice,
    Delta,
    FinishReason,
    Generation,
    KvBlend,
    Prompt,
    RequestOptions,
    Sampling,
    TokenLogprobs,
    Usage,
)
from pdserve.rpc_errors import error_from_rpc, is_connection_loss
from pdserve.v1 import inference_pb2, types_pb2

FIRST_RETRY_S = 0.05
LONGEST_RETRY_S = 1.0

_FINISH: dict[types_pb2.FinishReason.ValueType, FinishReason | None] = {
    types_pb2.FINISH_REASON_UNSPECIFIED: None,
    types_pb2.FINISH_REASON_STOP: "stop",
    types_pb2.FINISH_REASON_LENGTH: "length",
    types_pb2.FINISH_REASON_CANCELLED: "cancelled",
}
_METHODS: dict[Literal["blend", "epic"], inference_pb2.KvBlend.Method.ValueType] = {
    "blend": inference_pb2.KvBlend.METHOD_BLEND,
    "epic": inference_pb2.KvBlend.METHOD_EPIC,
}


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a call goes on without an answer. `timeout_s` bounds it all; None = the server's own limit."""

    timeout_s: float | None
    connect_s: float  # before the first answer
    resume_s: float  # after it, for one gap


@dataclass(slots=True)
class _Arrived:
    """Of one choice."""

    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str = ""


class GenerateCall:
    """Folds responses into deltas; after a loss, says when and with what message to go on."""

    def __init__(self, message: inference_pb2.GenerateRequest, patience: Patience, now_s: float) -> None:
        self._message = message
        self._patience = patience
        self._deadline_s = None if patience.timeout_s is None else now_s + patience.timeout_s
        self._heard_s = now_s  # when something was last received, or the call began
        self._retry_s = FIRST_RETRY_S
        self._resumed = False
        self._begun = False
        self._arrived = [_Arrived() for _ in range(message.n)]
        self._usage = Usage(0, 0, 0)
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def request_id(self) -> str:
        return self._message.request_id

    @property
    def finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self._arrived)

    def message(self) -> inference_pb2.GenerateRequest:
        """To be sent now: the request, from the first token that has not arrived."""
        if self._resumed:
            self._message.next_index[:] = [len(choice.token_ids) for choice in self._arrived]
        return self._message

    def remaining_s(self, now_s: float) -> float | None:
        """Timeout of the next attempt. Raises DeadlineExceeded where no time is left."""
        if self._deadline_s is None:
            return None
        if now_s >= self._deadline_s:
            raise DeadlineExceeded(f"The request did not end within {self._patience.timeout_s:g} s.")
        return self._deadline_s - now_s

    def fold(self, response: inference_pb2.GenerateResponse, now_s: float) -> list[Delta]:
        """What is new in `response`. Raises InternalError where tokens are missing."""
        self._heard_s, self._retry_s, self._begun = now_s, FIRST_RETRY_S, True
        if response.prompt_logprobs:
            self._prompt_logprobs = _rows(response.prompt_logprobs)
        if response.HasField("usage"):
            usage = response.usage
            self._usage = Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.blended_tokens)
        deltas = (self._choice(message) for message in response.choices)
        return [delta for delta in deltas if delta is not None]

    def lost(self, error: grpc.RpcError, now_s: float) -> float:
        """Seconds to wait before the next attempt. Raises the typed error where there shall be none."""
        typed = error_from_rpc(error)
        if not is_connection_loss(error) or self.finished:
            raise typed from error
        limit_s = self._patience.resume_s if self._begun else self._patience.connect_s
        if now_s - self._heard_s >= limit_s or (self._deadline_s is not None and now_s >= self._deadline_s):
            raise typed from error
        return self._wait_s()

    def ended_early(self) -> float:
        """The stream ended without an error and without all finish reasons: taken up again, like a loss."""
        if not self._begun:
            raise InternalError("The server ended the stream before it began.")
        return self._wait_s()

    def result(self) -> Generation:
        assert self.finished
        choices = tuple(
            Choice(
                "".join(one.text),
                tuple(one.token_ids),
                tuple(one.logprobs),
                one.finish_reason or "stop",
                one.stop_reason,
            )
            for one in self._arrived
        )
        return Generation(self.request_id, choices, self._usage, self._prompt_logprobs)

    def _wait_s(self) -> float:
        self._resumed = True
        wait_s, self._retry_s = self._retry_s, min(self._retry_s * 2, LONGEST_RETRY_S)
        return wait_s

    def _choice(self, message: inference_pb2.ChoiceDelta) -> Delta | None:
        if message.choice >= len(self._arrived):
            raise InternalError(f"The server sent choice {message.choice} of {len(self._arrived)}.")
        arrived = self._arrived[message.choice]
        have = len(arrived.token_ids)
        if message.index > have:
            raise InternalError(f"Tokens {have} to {message.index - 1} of choice {message.choice} never came.")
        if message.index < have or arrived.finish_reason is not None:
            return None  # told again after a resume
        delta = _delta(message)
        arrived.token_ids += delta.token_ids
        arrived.text.append(delta.text)
        arrived.logprobs += delta.logprobs
        arrived.finish_reason, arrived.stop_reason = delta.finish_reason, delta.stop_reason
        return delta


def new_call(
    prompt: Prompt, sampling: Sampling, n: int, stop: Sequence[str], options: RequestOptions
) -> inference_pb2.GenerateRequest:
    """Raises InvalidRequest for what cannot be put into a message; the server checks the rest."""
    if n < 1:
        raise InvalidRequest("n must be at least 1.", param="n")
    request = inference_pb2.GenerateRequest(
        request_id=options.request_id or f"sdk-{secrets.token_hex(12)}",
        model=options.model,
        sampling=_sampling(sampling),
        n=n,
        stop=stop,
        priority=options.priority,
        cache_salt=options.cache_salt,
        skip_text=options.token_ids_only,
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids = _packed(prompt)
    if options.route is not None:
        route = options.route
        request.route.CopyFrom(
            inference_pb2.RouteHint(
                prefill_worker=route.prefill_worker, decode_worker=route.decode_worker, transport=route.transport
            )
        )
    if options.kv_blend is not None:
        request.kv_blend.CopyFrom(_blend(options.kv_blend))
    return request


def _blend(blend: KvBlend) -> inference_pb2.KvBlend:
    try:
        message = inference_pb2.KvBlend(
            method=_METHODS[blend.method],
            ratio=None if blend.ratio == "auto" else blend.ratio,
            auto_ratio=blend.ratio == "auto",
            first_tokens=blend.first_tokens,
            chunks=[inference_pb2.TokenSpan(start=start, end=end) for start, end in blend.chunks],
        )
    except (KeyError, ValueError, TypeError) as error:
        raise InvalidRequest(f"kv_blend: {error}", param="kv_blend") from error
    if isinstance(blend.separator, str) and blend.separator:
        message.separator_text = blend.separator
    elif blend.separator:
        message.separator_ids = _packed(blend.separator)
    return message


def _packed(token_ids: Sequence[int]) -> bytes:
    try:
        return struct.pack(f"<{len(token_ids)}i", *token_ids)
    except struct.error as error:
        raise InvalidRequest(f"prompt: token ids must be 32-bit integers: {error}", param="prompt") from error


def _sampling(sampling: Sampling) -> types_pb2.SamplingParams:
    try:
        return types_pb2.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=sampling.logit_bias,
            seed=sampling.seed,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            ignore_eos=sampling.ignore_eos,
            stop_token_ids=sampling.stop_token_ids,
            logprobs=sampling.logprobs,
            prompt_logprobs=sampling.prompt_logprobs,
        )
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"sampling: {error}", param="sampling") from error


def _delta(message: inference_pb2.ChoiceDelta) -> Delta:
    return Delta(
        message.choice,
        message.index,
        tuple(message.token_ids),
        message.text,
        _rows(message.logprobs),
        _FINISH[message.finish_reason],
        message.stop_reason,
    )


def _rows(rows: Sequence[types_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(tuple(row.token_ids), tuple(row.logprobs)) for row in rows)
