"""Owns the field types of bodies that pydantic has no word for: prompts, stop strings, logit biases, message contents. Pure.

Each is one plain validator, so that 100,000 token ids cost a millisecond and an error names the field, not a branch of a union.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import PlainValidator, WithJsonSchema

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_BIASES = 1024
MAX_PARTS = 1024
MAX_PROMPTS = 1024
INT32_MAX = 2**31 - 1

_STRING = {"type": "string"}
_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": INT32_MAX}, "minItems": 1}


@dataclass(frozen=True, slots=True)
class PromptInput:
    """The prompts of one request, in order: texts or lists of token ids."""

    prompts: tuple[str | list[int], ...]


def check_ids(value: object) -> list[int]:
    """A non-empty list of token ids. The vocabulary is checked later, with the tokenizer at hand."""
    if not isinstance(value, list) or not value:
        raise ValueError("must be a non-empty list of token ids")
    if set(map(type, value)) != {int}:
        raise ValueError("token ids must be integers")
    if min(value) < 0 or max(value) > INT32_MAX:
        raise ValueError(f"token ids go from 0 to {INT32_MAX}")
    return value


def _prompt(value: object) -> PromptInput:
    if isinstance(value, str):
        return PromptInput((value,))
    if not isinstance(value, list) or not value:
        raise ValueError(
            "must be a string, a list of strings, a list of token ids or a list of lists of token ids; not empty"
        )
    if type(value[0]) is int:
        return PromptInput((check_ids(value),))
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts are allowed")
    if all(isinstance(one, str) for one in value):
        return PromptInput(tuple(value))
    return PromptInput(tuple(check_ids(one) for one in value))


def _stop(value: object) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"at most {MAX_STOPS} stop strings are allowed, here are {len(stops)}")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise ValueError(f"stop strings have 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _bias(key: object, bias: object) -> tuple[int, float]:
    if not isinstance(key, str) or not key.isascii() or not key.isdecimal() or len(key) > 10:
        raise ValueError("keys must be token ids, written as strings")
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
        raise ValueError("biases must be numbers from -100 to 100")
    return int(key), float(bias)


def _logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and biases")
    if len(value) > MAX_BIASES:
        raise ValueError(f"at most {MAX_BIASES} tokens can be biased, here are {len(value)}")
    return tuple(sorted(dict(_bias(key, bias) for key, bias in value.items()).items()))


def _content(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    if len(value) > MAX_PARTS:
        raise ValueError(f"at most {MAX_PARTS} parts are allowed, here are {len(value)}")
    return "\n".join(_text_part(part) for part in value)


def _text_part(part: object) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else None
        found = f", not {kind[:64]!r}" if isinstance(kind, str) and kind != "text" else ""
        raise ValueError(f'parts must be {{"type": "text", "text": "…"}}{found}: only text is understood')
    return str(part["text"])


def _nullable(*schemas: dict[str, object]) -> dict[str, object]:
    return {"anyOf": [*schemas, {"type": "null"}]}


_STOP_ITEM: dict[str, object] = {**_STRING, "minLength": 1, "maxLength": MAX_STOP_CHARS}
_PART = {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": _STRING}}

TokenIds = Annotated[list[int], PlainValidator(check_ids), WithJsonSchema(_IDS)]
Prompt = Annotated[
    PromptInput,
    PlainValidator(_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_PROMPTS},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        }
    ),
]
Stop = Annotated[
    tuple[str, ...],
    PlainValidator(_stop),
    WithJsonSchema(_nullable(_STOP_ITEM, {"type": "array", "items": _STOP_ITEM, "maxItems": MAX_STOPS})),
]
LogitBias = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(_logit_bias),
    WithJsonSchema(
        _nullable(
            {
                "type": "object",
                "propertyNames": {"pattern": "^[0-9]{1,10}$"},
                "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                "maxProperties": MAX_BIASES,
            }
        )
    ),
]
Content = Annotated[
    str | None,
    PlainValidator(_content),
    WithJsonSchema(_nullable(_STRING, {"type": "array", "items": _PART, "maxItems": MAX_PARTS})),
]
