"""Owns the blocks of the device: reference counts, generations, and the LRU order of cached blocks. Pure.

A block is free, held (one reference per table that lists it) or cached (nobody holds it, its content is in the prefix index).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class PoolExhausted(Exception):
    """Fewer blocks are free or cached than were asked for; nothing was taken."""


class BlockPool:
    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))  # last released first: its memory is warm
        self._references = [0] * size
        self._generations = [0] * size
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def available(self) -> int:
        """Blocks that are free or cached, and so can be taken."""
        return len(self._free) + len(self._cached)

    @property
    def held(self) -> int:
        return self.size - self.available

    def references(self, block: int) -> int:
        return self._references[block]

    def generation(self, block: int) -> int:
        """Number of owners that `block` has had; raised at each reuse."""
        return self._generations[block]

    def allocate(self, count: int) -> tuple[list[int], list[int]]:
        """Takes `count` blocks with one reference each, all or nothing. Returns (blocks, those of them that were cached:
        their content is lost and must leave the index). Raises PoolExhausted."""
        if count > self.available:
            raise PoolExhausted(f"{count} blocks asked for, {self.available} of {self.size} are free")
        evicted: list[int] = []
        blocks: list[int] = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                evicted.append(block)
            self._references[block] = 1
            self._generations[block] += 1
            blocks.append(block)
        # Eviction gives chains from their end; in order, neighbours travel in one message of a hand-off.
        return sorted(blocks), evicted

    def share(self, blocks: Iterable[int]) -> None:
        """Adds one reference to each block, held or cached."""
        for block in blocks:
            if not self._references[block]:
                del self._cached[block]
            self._references[block] += 1

    def unheld(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds: sharing them takes as many from `available`."""
        return sum(not self._references[block] for block in blocks)

    def release(self, blocks: Sequence[int], indexed: Iterable[bool]) -> None:
        """Drops one reference of each block; one that nobody holds any more is cached if it is indexed, else free."""
        # Last block first: a chain is then evicted from its end, so that what is left of it stays reachable.
        for block, keep in reversed(list(zip(blocks, indexed, strict=True))):
            assert self._references[block] > 0, f"block {block} released more often than held"
            self._references[block] -= 1
            if self._references[block]:
                continue
            if keep:
                self._cached[block] = None
            else:
                self._free.append(block)

    def touch(self, block: int) -> None:
        """A cached block is the last to be evicted now."""
        if block in self._cached:
            self._cached.move_to_end(block)

    def drop_cached(self) -> list[int]:
        """Frees every cached block and returns them; they must leave the index."""
        dropped = list(self._cached)
        self._cached.clear()
        self._free.extend(dropped)
        return dropped

    def leaked(self, tables: Iterable[Sequence[int]]) -> int:
        """The audit: blocks whose references are not those of the live `tables`, and blocks that are in no state at all."""
        listed = [0] * self.size
        for table in tables:
            for block in table:
                listed[block] += 1
        wrong = 0
        if listed != self._references:  # one comparison is all that a sound pool costs
            wrong = sum(have != want for have, want in zip(self._references, listed, strict=True))
        unheld = self._references.count(0)
        return wrong + abs(unheld - self.available)
