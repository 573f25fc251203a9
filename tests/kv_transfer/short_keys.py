"""Owns the hashes of test builds: chained keys and fingerprints of so few bits that different pages get the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import xxhash

from kv_transfer import keys

WHOLE_FINGERPRINT = 64


def shorten_keys(bits: int, fingerprint_bits: int = WHOLE_FINGERPRINT) -> None:
    """In this process, from now on: all but the first `bits` (at most 32) of every unit's key are zero, and all but the last
    `fingerprint_bits` of every page's fingerprint."""
    keys.unit_hash = lambda parent: _ShortHash(parent, bits)
    keys.fingerprint_hash = lambda tokens, seed: xxhash.xxh3_64_intdigest(tokens, seed) % (1 << fingerprint_bits)


@contextmanager
def shortened_keys(bits: int, fingerprint_bits: int = WHOLE_FINGERPRINT) -> Iterator[None]:
    before = keys.unit_hash, keys.fingerprint_hash
    shorten_keys(bits, fingerprint_bits)
    try:
        yield
    finally:
        keys.unit_hash, keys.fingerprint_hash = before


class _ShortHash:
    def __init__(self, parent: bytes, bits: int) -> None:
        self._sha256 = hashlib.sha256(parent)
        self._zero_bits = 32 - bits

    def update(self, data: memoryview, /) -> None:
        self._sha256.update(data)

    def digest(self) -> bytes:
        kept = int.from_bytes(self._sha256.digest()[:4]) >> self._zero_bits << self._zero_bits
        return kept.to_bytes(4).ljust(keys.HASH_BYTES, b"\0")
