"""Owns message tags: ranges that one destination process issues once and never again. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass

import xxhash

from pdserve.errors import InternalError

_SPACE = 1 << 64


@dataclass(frozen=True, slots=True)
class TagRange:
    """Tags first .. first + count - 1."""

    first: int
    count: int

    def __contains__(self, tag: int) -> bool:
        return self.first <= tag < self.first + self.count


class TagAllocator:
    """Counts upwards from a random start mixed with the incarnation.

    UCX matches forced tags worker-wide, so a tag used twice would deliver stale bytes of another peer. The start lies in the
    lower half of the 64-bit space: 2**63 tags are left, no process lives that long.
    """

    def __init__(self, incarnation: int, rng: random.Random) -> None:
        salt = xxhash.xxh3_64_intdigest(incarnation.to_bytes(8, "little"))
        self._next = (rng.getrandbits(64) ^ salt) >> 1

    def allocate(self, count: int) -> TagRange:
        if count < 1 or self._next + count >= _SPACE:
            raise InternalError(f"No range of {count} tags can be issued.")
        issued = TagRange(self._next, count)
        self._next += count
        return issued
