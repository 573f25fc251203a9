"""Owns the checksum of KV blocks: xxh3_128 of each block of one layer. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

ALGORITHM = "xxh3_128"
CHECKSUM_BYTES = 16


def block_checksums(data: memoryview, block_bytes: int) -> list[bytes]:
    """One 16-byte digest per block of `data`, whose length is a multiple of `block_bytes`."""
    digest = xxhash.xxh3_128_digest
    return [digest(data[start : start + block_bytes]) for start in range(0, len(data), block_bytes)]


def first_mismatch(data: memoryview, block_bytes: int, expected: Sequence[bytes]) -> int | None:
    """Ordinal of the first block whose digest differs from `expected`; None where all are equal."""
    for ordinal, (seen, wanted) in enumerate(zip(block_checksums(data, block_bytes), expected, strict=True)):
        if seen != wanted:
            return ordinal
    return None
