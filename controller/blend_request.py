"""Owns the translation of a gRPC KvBlend: defaults, and which tokens of the prompt it marks. Pure."""

from __future__ import annotations

from controller.kv_blend import (
    DEFAULT_FIRST_TOKENS,
    DEFAULT_RATIO,
    KvBlend,
    Method,
    Ratio,
    Recipe,
    blend,
    marked,
    separated,
)
from kv_transfer.keys import TOKEN_BYTES
from pdserve.errors import InvalidRequest
from pdserve.v1 import inference_pb2

_METHODS: dict[inference_pb2.KvBlend.Method.ValueType, Method] = {
    inference_pb2.KvBlend.METHOD_UNSPECIFIED: "blend",
    inference_pb2.KvBlend.METHOD_BLEND: "blend",
    inference_pb2.KvBlend.METHOD_EPIC: "epic",
}


def recipe_of(message: inference_pb2.KvBlend) -> Recipe:
    """Raises InvalidRequest."""
    if message.method not in _METHODS:
        raise InvalidRequest("kv_blend.method: is unknown: use METHOD_BLEND or METHOD_EPIC.", param="kv_blend.method")
    first_tokens = message.first_tokens if message.HasField("first_tokens") else DEFAULT_FIRST_TOKENS
    return Recipe(_METHODS[message.method], _ratio(message), first_tokens)


def blend_of(message: inference_pb2.KvBlend, token_ids: bytes) -> KvBlend | None:
    """None where no chunk is worth it. A separator must have been tokenised. Raises InvalidRequest."""
    recipe = recipe_of(message)
    by_separator = message.WhichOneof("separator") is not None
    if by_separator == bool(message.chunks):
        raise InvalidRequest("kv_blend: say where the chunks are: give either chunks or a separator.", param="kv_blend")
    prompt_tokens = len(token_ids) // TOKEN_BYTES
    if by_separator:
        if len(message.separator_ids) % TOKEN_BYTES:
            raise InvalidRequest("kv_blend.separator: must be whole int32 values.", param="kv_blend.separator")
        return blend(recipe, separated(token_ids, message.separator_ids), prompt_tokens)
    return blend(recipe, marked([(span.start, span.end) for span in message.chunks], prompt_tokens), prompt_tokens)


def _ratio(message: inference_pb2.KvBlend) -> Ratio:
    if message.auto_ratio and message.HasField("ratio"):
        raise InvalidRequest("kv_blend.ratio: give either a number or auto_ratio.", param="kv_blend.ratio")
    if message.auto_ratio:
        return "auto"
    return message.ratio if message.HasField("ratio") else DEFAULT_RATIO
