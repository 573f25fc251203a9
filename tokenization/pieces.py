"""Owns what each token id adds to the text, as bytes, so that text is a concatenation of pieces. Pure.

Only decoders that concatenate are known (byte-level BPE; sentencepiece with Replace/Metaspace, ByteFallback, Fuse, Strip); any
other is refused by name, because windowed re-decoding would depend on how the ids were split.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from pdserve.errors import ModelUnsupported

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PER_TOKEN = frozenset({"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"})


class DecoderSpec(msgspec.Struct):
    """The `decoder` of tokenizer.json."""

    type: str
    decoders: list[DecoderSpec] = []
    pattern: dict[str, str] | None = None
    content: str = ""
    replacement: str = "▁"
    prepend_scheme: str = "always"
    start: int = 0
    stop: int = 0


@dataclass(frozen=True, slots=True)
class PieceRule:
    """token text -> bytes, and the spaces that open a whole text but are not part of it."""

    to_bytes: Callable[[str], bytes]
    leading_spaces: int


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(rest)}


_BYTE_OF = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:  # an added token, which is kept as plain text
        return token.encode()


def _sentencepiece(spec: list[DecoderSpec]) -> Callable[[str], bytes]:
    replacements: list[tuple[str, str]] = []
    for step in spec:
        if step.type == "Metaspace":
            replacements.append((step.replacement, " "))
        elif step.type == "Replace":
            if step.pattern is None or "String" not in step.pattern:
                raise _unsupported("Replace with a regular expression")
            replacements.append((step.pattern["String"], step.content))
    byte_fallback = any(step.type == "ByteFallback" for step in spec)

    def to_bytes(token: str) -> bytes:
        if byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return to_bytes


def _leading_spaces(spec: list[DecoderSpec]) -> int:
    spaces = 0
    for place, step in enumerate(spec):
        if step.type == "Strip":
            fused = any(before.type == "Fuse" for before in spec[:place])
            if step.content != " " or step.stop or not fused:
                raise _unsupported("Strip that is not of the text's leading spaces")
            spaces += step.start
        elif step.type == "Metaspace" and step.prepend_scheme != "never":
            spaces += 1
    return spaces


def _flatten(spec: DecoderSpec) -> list[DecoderSpec]:
    if spec.type != "Sequence":
        return [spec]
    return [leaf for child in spec.decoders for leaf in _flatten(child)]


def _unsupported(what: str) -> ModelUnsupported:
    return ModelUnsupported(
        f"The tokenizer's decoder uses {what}, which cannot be streamed exactly. "
        "Byte-level BPE and sentencepiece (Metaspace, ByteFallback) tokenizers can be served."
    )


def piece_rule(decoder: DecoderSpec | None) -> PieceRule:
    """Raises ModelUnsupported for a decoder that is not a concatenation."""
    if decoder is None:
        raise _unsupported("no decoder")
    steps = _flatten(decoder)
    names = {step.type for step in steps}
    if names == {"ByteLevel"}:
        return PieceRule(_byte_level, leading_spaces=0)
    if not names or not names <= _PER_TOKEN:
        raise _unsupported(", ".join(sorted(names - _PER_TOKEN)) or "nothing")
    return PieceRule(_sentencepiece(steps), _leading_spaces(steps))
