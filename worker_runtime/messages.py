"""Owns the translation between the session's protobuf messages and the engine's structs, with the bounds of both. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from engine import protocol
from kv_transfer.keys import HASH_BYTES, HASH_UNIT_TOKENS, TOKEN_BYTES
from pdserve.errors import InvalidRequest
from pdserve.v1 import types_pb2, worker_pb2

MAX_CHOICES = 256
MAX_WORK_TOKENS = 4 * 2**20
MAX_LIST_ITEMS = 4096  # logit_bias, stop ids
MAX_NAME_CHARS = 256
MAX_LOGPROBS = 1024
MAX_CHUNKS = 1024
MAX_TENANT_BYTES = 32
_BLEND_METHODS: dict[worker_pb2.Blend.Method.ValueType, Literal["blend", "epic"]] = {
    worker_pb2.Blend.METHOD_BLEND: "blend",
    worker_pb2.Blend.METHOD_EPIC: "epic",
}


def dispatch_from_proto(message: types_pb2.DispatchId) -> protocol.Dispatch:
    return protocol.Dispatch(message.request_key, message.attempt)


def dispatch_to_proto(dispatch: protocol.Dispatch) -> types_pb2.DispatchId:
    return types_pb2.DispatchId(request_key=dispatch.request_key, attempt=dispatch.attempt)


def work_from_proto(message: worker_pb2.Work) -> protocol.Work:
    """Raises InvalidRequest, which ends the session: a controller validates before it sends."""
    tokens = len(message.token_ids) // TOKEN_BYTES
    _check(message.HasField("dispatch"), "dispatch", "is missing")
    _check(message.dispatch.attempt > 0, "dispatch.attempt", "must count from 1")
    _check(len(message.request_id) <= MAX_NAME_CHARS, "request_id", f"exceeds {MAX_NAME_CHARS} characters")
    _check(0 < len(message.choices) <= MAX_CHOICES, "choices", f"must hold 1 to {MAX_CHOICES} choices")
    _check(len(set(message.choices)) == len(message.choices), "choices", "must be distinct")
    _check(len(message.token_ids) % TOKEN_BYTES == 0, "token_ids", "must be whole int32 values")
    _check(0 < tokens <= MAX_WORK_TOKENS, "token_ids", f"must hold 1 to {MAX_WORK_TOKENS} tokens")
    _check(0 < message.prompt_tokens <= tokens, "prompt_tokens", "must lie within token_ids")
    _check(len(message.block_hashes) % HASH_BYTES == 0, "block_hashes", f"must be whole keys of {HASH_BYTES} bytes")
    _check(len(message.tenant) <= MAX_TENANT_BYTES, "tenant", f"exceeds {MAX_TENANT_BYTES} bytes")
    hashes = len(message.block_hashes) // HASH_BYTES
    _check(hashes <= tokens // HASH_UNIT_TOKENS, "block_hashes", "has more keys than full units of tokens")
    return protocol.Work(
        dispatch=dispatch_from_proto(message.dispatch),
        request_id=message.request_id,
        choices=tuple(message.choices),
        token_ids=message.token_ids,
        prompt_tokens=message.prompt_tokens,
        sampling=sampling_from_proto(message.sampling),
        block_hashes=message.block_hashes,
        priority=message.priority,
        chunks=tuple(_chunk(chunk, message.prompt_tokens) for chunk in message.chunks),
        blend=_blend(message) if message.HasField("blend") else None,
        tenant=message.tenant,
        source=_source(message.source) if message.HasField("source") else None,
    )


def _source(message: worker_pb2.KvSource) -> protocol.KvSource:
    for name in ("worker_id", "address"):
        _check(
            0 < len(getattr(message, name)) <= MAX_NAME_CHARS,
            f"source.{name}",
            f"needs 1 to {MAX_NAME_CHARS} characters",
        )
    return protocol.KvSource(message.worker_id, message.address, message.tokens)


def _chunk(message: worker_pb2.Chunk, prompt_tokens: int) -> protocol.ChunkSpan:
    units = -(-message.count // HASH_UNIT_TOKENS)
    _check(0 < message.count <= prompt_tokens, "chunks", "must lie inside the prompt")
    _check(len(message.keys) == units * HASH_BYTES, "chunks.keys", "must hold one key per unit of 16 tokens")
    return protocol.ChunkSpan(message.start, message.count, message.keys)


def _blend(work: worker_pb2.Work) -> protocol.BlendSpec:
    message = work.blend
    _check(0 < len(work.chunks) <= MAX_CHUNKS, "chunks", f"must be 1 to {MAX_CHUNKS} where KV is blended")
    _check(not work.block_hashes, "block_hashes", "must be empty where KV is blended: it is approximate")
    _check(message.method in _BLEND_METHODS, "blend.method", "is unknown")
    _check(0 <= message.ratio <= 1, "blend.ratio", "must lie in 0 .. 1")
    return protocol.BlendSpec(_BLEND_METHODS[message.method], message.ratio, message.first_tokens)


def sampling_from_proto(message: types_pb2.SamplingParams) -> protocol.Sampling:
    _check(message.HasField("seed"), "sampling.seed", "must be set by the controller")
    _check(message.HasField("max_tokens"), "sampling.max_tokens", "must be set by the controller")
    _check(len(message.logit_bias) <= MAX_LIST_ITEMS, "sampling.logit_bias", f"exceeds {MAX_LIST_ITEMS} entries")
    _check(len(message.stop_token_ids) <= MAX_LIST_ITEMS, "sampling.stop_token_ids", f"exceeds {MAX_LIST_ITEMS} ids")
    for name in ("logprobs", "prompt_logprobs"):
        _check(getattr(message, name) <= MAX_LOGPROBS, f"sampling.{name}", f"exceeds {MAX_LOGPROBS}")
    return protocol.Sampling(
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        top_k=message.top_k,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
        seed=message.seed,
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        ignore_eos=message.ignore_eos,
        stop_token_ids=tuple(message.stop_token_ids),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def sampling_to_proto(sampling: protocol.Sampling) -> types_pb2.SamplingParams:
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


def logprobs_to_proto(row: protocol.LogprobRow | None) -> types_pb2.TokenLogprobs:
    if row is None:
        return types_pb2.TokenLogprobs()
    return types_pb2.TokenLogprobs(token_ids=row.token_ids, logprobs=row.logprobs)


def prompt_logprobs_to_proto(event: protocol.PromptLogprobs) -> worker_pb2.PromptLogprobs:
    return worker_pb2.PromptLogprobs(
        dispatch=dispatch_to_proto(event.dispatch), positions=[logprobs_to_proto(row) for row in event.rows]
    )


def choices_of(message: Iterable[int]) -> tuple[int, ...]:
    choices = tuple(message)
    _check(len(choices) <= MAX_CHOICES, "choices", f"exceeds {MAX_CHOICES} choices")
    return choices


def _check(holds: bool, param: str, what: str) -> None:
    if not holds:
        raise InvalidRequest(f"{param} {what}.", param=param)
