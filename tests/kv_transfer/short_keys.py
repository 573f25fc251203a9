"""Owns the key function of test builds: chained keys of so few bits that different pages get the same one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from kv_transfer import keys


def shorten_keys(bits: int) -> None:
    """In this process, from now on: all but the first `bits` (at most 32) of every unit's key are zero."""
    keys.unit_hash = lambda parent: _ShortHash(parent, bits)


@contextmanager
def shortened_keys(bits: int) -> Iterator[None]:
    before = keys.unit_hash
    shorten_keys(bits)
    try:
        yield
    finally:
        keys.unit_hash = before


class _ShortHash:
    def __init__(self, parent: bytes, bits: int) -> None:
        self._sha256 = hashlib.sha256(parent)
        self._zero_bits = 32 - bits

    def update(self, data: memoryview, /) -> None:
        self._sha256.update(data)

    def digest(self) -> bytes:
        kept = int.from_bytes(self._sha256.digest()[:4]) >> self._zero_bits << self._zero_bits
        return kept.to_bytes(4).ljust(keys.HASH_BYTES, b"\0")
