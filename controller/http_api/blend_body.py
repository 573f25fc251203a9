"""Owns the `kv_blend` object of a body: its fields, types and bounds. What it marks is in `blend_marks`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from controller.http_api.field_types import INT32_MAX, check_ids
from controller.kv_blend import DEFAULT_FIRST_TOKENS, DEFAULT_RATIO, MAX_CHUNKS, Ratio, Recipe

MAX_SEPARATOR_CHARS = 1024
_OFFSET = {"type": "integer", "minimum": 0, "maximum": INT32_MAX}
_PAIR = {"type": "array", "items": _OFFSET, "minItems": 2, "maxItems": 2}

Pairs = tuple[tuple[int, int], ...]


def _chunks(value: object) -> Pairs | Literal["messages"] | None:
    if value is None:
        return None
    if value == "messages":
        return "messages"
    if not isinstance(value, list) or not value:
        raise ValueError('must be a non-empty list of [start, end] token offsets or, in chats, "messages"')
    if len(value) > MAX_CHUNKS:
        raise ValueError(f"at most {MAX_CHUNKS} chunks are allowed, here are {len(value)}; join neighbours")
    return tuple(_pair(one) for one in value)


def _pair(value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or set(map(type, value)) != {int}:
        raise ValueError("each chunk must be [start, end], two token offsets")
    start, end = value
    if not 0 <= start <= INT32_MAX or not 0 <= end <= INT32_MAX:
        raise ValueError(f"offsets go from 0 to {INT32_MAX}")
    return start, end


def _separator(value: object) -> str | tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        if not 1 <= len(value) <= MAX_SEPARATOR_CHARS:
            raise ValueError(f"must have 1 to {MAX_SEPARATOR_CHARS} characters")
        return value
    ids = check_ids(value)
    if len(ids) > MAX_SEPARATOR_CHARS:
        raise ValueError(f"must have 1 to {MAX_SEPARATOR_CHARS} token ids")
    return tuple(ids)


def _ratio(value: object) -> Ratio:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError('must be a number from 0 to 1, or "auto"')
    return value


ChunkMarks = Annotated[
    Pairs | Literal["messages"] | None,
    PlainValidator(_chunks),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "array", "items": _PAIR, "minItems": 1, "maxItems": MAX_CHUNKS},
                {"const": "messages"},
                {"type": "null"},
            ]
        }
    ),
]
Separator = Annotated[
    str | tuple[int, ...] | None,
    PlainValidator(_separator),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_SEPARATOR_CHARS},
                {"type": "array", "items": _OFFSET, "minItems": 1, "maxItems": MAX_SEPARATOR_CHARS},
                {"type": "null"},
            ]
        }
    ),
]


BlendRatio = Annotated[
    Ratio,
    PlainValidator(_ratio),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"const": "auto"}]}),
]


class KvBlendBody(BaseModel):
    """Reuse of KV of chunks wherever they stand: approximate, and only where the operator allows it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["blend", "epic"] = Field(
        "blend",
        description="blend: CacheBlend, the tokens whose KV deviates most are computed anew; epic: the first ones.",
    )
    ratio: BlendRatio = Field(
        DEFAULT_RATIO,
        description='blend: share of the chunks\' tokens computed anew, or "auto": by measured speeds of loading and computing.',
    )
    first_tokens: int = Field(
        DEFAULT_FIRST_TOKENS, ge=0, le=INT32_MAX, description="epic: tokens of each chunk computed anew."
    )
    chunks: ChunkMarks = Field(
        None, description='[[start, end], …] in tokens, end exclusive; in chats also "messages": all but the last one.'
    )
    separator: Separator = Field(
        None, description="Text or token ids between chunks, as they occur in the tokenised prompt."
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> KvBlendBody:
        if (self.chunks is None) == (self.separator is None):
            raise ValueError("say where the chunks are: give either chunks or separator")
        return self

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.method, self.ratio, self.first_tokens)
