"""Owns the wire format of KV connections: the hello, and the header of the tcp transport's frames. Pure."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pdserve.errors import TransferFailed

HELLO_BYTES = 16
# The magic comes last, so that a shortened hello fails too.
_HELLO_MAGIC = b"PDKV"
WIRE_HELLO_BYTES = HELLO_BYTES + len(_HELLO_MAGIC)

_HEADER = struct.Struct("<4sQQ")
_FRAME_MAGIC = b"PDF1"
HEADER_BYTES = _HEADER.size

# No message of ours is larger; a header that says so is malformed.
MAX_FRAME_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class FrameHeader:
    tag: int
    length_bytes: int


def pack_hello(hello: bytes) -> bytes:
    if len(hello) != HELLO_BYTES:
        raise ValueError(f"a hello has {HELLO_BYTES} bytes, not {len(hello)}")
    return hello + _HELLO_MAGIC


def unpack_hello(data: bytes) -> bytes:
    """The 16 bytes that the peer chose. Raises TransferFailed where `data` is no hello."""
    if len(data) != WIRE_HELLO_BYTES or data[HELLO_BYTES:] != _HELLO_MAGIC:
        raise TransferFailed("The peer's first message is not a hello of this protocol.")
    return data[:HELLO_BYTES]


def pack_header(tag: int, length_bytes: int) -> bytes:
    return _HEADER.pack(_FRAME_MAGIC, tag, length_bytes)


def unpack_header(data: bytes | bytearray | memoryview) -> FrameHeader:
    """Raises TransferFailed where magic or length are not ours."""
    magic, tag, length_bytes = _HEADER.unpack(data)
    if magic != _FRAME_MAGIC:
        raise TransferFailed(f"Malformed KV frame: magic {magic!r}.")
    if not 0 < length_bytes <= MAX_FRAME_BYTES:
        raise TransferFailed(f"Malformed KV frame: {length_bytes} bytes, allowed are 1 to {MAX_FRAME_BYTES}.")
    return FrameHeader(tag, length_bytes)
