"""Owns the first block of a segment file: whose it is, and from which sequence on its records count. Pure.

Its last 8 bytes are the xxh3_64 of all before them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from kv_store.disk.layout import BLOCK_BYTES
from kv_store.page import FORMAT_DIGEST_BYTES
from kv_store.tier import VerifyFailure

_MAGIC = b"pdskvseg"
_VERSION = 1
_CHECKSUM_BYTES = 8
# magic, version, format digest, number, bytes of the file, first sequence
_SEGMENT = struct.Struct(f"<8sH{FORMAT_DIGEST_BYTES}sIQQ")


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    format_digest: bytes
    number: int
    segment_bytes: int
    first_sequence: int


def pack_segment(header: SegmentHeader) -> bytes:
    fields = (header.format_digest, header.number, header.segment_bytes, header.first_sequence)
    block = _SEGMENT.pack(_MAGIC, _VERSION, *fields).ljust(BLOCK_BYTES - _CHECKSUM_BYTES, b"\0")
    return block + xxhash.xxh3_64_digest(block)


def unpack_segment(block: memoryview) -> SegmentHeader | VerifyFailure | None:
    """Of what could be read of the first block, or why it is none; None for a file that was never begun."""
    if not any(block):
        return None
    if len(block) < BLOCK_BYTES:
        return "length"
    magic, version, digest, number, size_bytes, first = _SEGMENT.unpack_from(block)
    whole = xxhash.xxh3_64_digest(block[:-_CHECKSUM_BYTES]) == block[-_CHECKSUM_BYTES:]
    if magic != _MAGIC or version != _VERSION or not whole:
        return "header"
    return SegmentHeader(digest, number, size_bytes, first)
