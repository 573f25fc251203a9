"""Owns the blocks of a modelled engine: reference counts, generations, and the prefix index over their keys. Pure.

A block is free (never filled since its last owner), held (one reference per table that lists it) or cached (no reference, but its
key is in the index; evicted in LRU order when blocks run out).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class PoolExhausted(Exception):
    """Fewer blocks are free or evictable than were asked for; nothing was taken."""


class BlockPool:
    def __init__(self, size: int) -> None:
        self.size = size
        self.held_references = 0
        self._free = list(range(size - 1, -1, -1))
        self._references = [0] * size
        self._generations = [0] * size
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._evicted: list[bytes] = []

    @property
    def available(self) -> int:
        """Blocks that are free or evictable."""
        return len(self._free) + len(self._cached)

    @property
    def held(self) -> int:
        """Blocks with at least one reference."""
        return self.size - self.available

    def references(self, block: int) -> int:
        return self._references[block]

    def generation(self, block: int) -> int:
        """Number of times that `block` has got a new owner."""
        return self._generations[block]

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks with one reference each, all or nothing. Raises PoolExhausted."""
        if count > self.available:
            raise PoolExhausted(f"{count} blocks asked for, {self.available} of {self.size} are free")
        # Eviction gives chains from their end; in order, neighbours travel in one message of a hand-off.
        return sorted(self._take() for _ in range(count))

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        self._generations[block] += 1
        self.held_references += 1
        return block

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block)
        del self._block_of[key]
        self._evicted.append(key)

    def share(self, blocks: Iterable[int]) -> None:
        """Adds one reference to each block."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
            self.held_references += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drops one reference of each block; a block without any is cached if it has a key, else free."""
        # Last block first: a chain is then evicted from its end, and stays prefix-closed.
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released more often than held"
            self._references[block] -= 1
            self.held_references -= 1
            if self._references[block]:
                continue
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def store(self, block: int, key: bytes) -> bool:
        """Enters a full block in the index. False if the key or the block is there already."""
        if key in self._block_of or block in self._key_of:
            return False
        self._block_of[key] = block
        self._key_of[block] = key
        return True

    def lookup(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks of the longest indexed prefix of `keys`; no reference is taken."""
        blocks: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def clear_cached(self) -> None:
        """Forgets every block that nobody holds."""
        for block in self._cached:
            self._forget(block)
        self._free.extend(self._cached)
        self._cached.clear()

    def take_evicted(self) -> list[bytes]:
        """Keys evicted since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def leaked(self, tables: Iterable[Sequence[int]]) -> int:
        """Blocks held by fewer tables than their references say. `tables` are all tables of live dispatches."""
        listed = [0] * self.size
        for table in tables:
            for block in table:
                listed[block] += 1
        return sum(1 for block in range(self.size) if self._references[block] != listed[block])
