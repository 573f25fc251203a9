"""Owns the prefix index of the device pool: which block holds the KV of which chained key. Pure.

Next to the key the page's tokens are kept, and an independent fingerprint (keyed xxh3, chained over the pages like the key itself) for
those before them. Both are compared on every hit: a collision or a mix-up of keys is then a miss, never another prompt's KV.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass

from kv_transfer.keys import HASH_BYTES, HASH_UNIT_TOKENS, TOKEN_BYTES, chain_hashes, page_fingerprint


@dataclass(frozen=True, slots=True)
class PageKey:
    """Names one full page. unit_keys: chained keys of its hash units, the last one is the page's key. tokens: its ids, int32.
    parent, parent_fingerprint, parent_tokens: of the page before it; empty at the start of a chain."""

    unit_keys: bytes
    fingerprint: int
    tokens: bytes
    parent: bytes = b""
    parent_fingerprint: int = 0
    parent_tokens: bytes = b""

    @property
    def key(self) -> bytes:
        return self.unit_keys[-HASH_BYTES:]


class KeyChain:
    """The page keys of one growing sequence.

    The keys of the first tokens came with the work; later ones are chained on. Without any key there is nothing to chain to
    (the namespace root stays with the controller), and the chain stays empty.
    """

    __slots__ = ("_given", "_page_tokens", "_pages", "_seed", "tenant")

    def __init__(self, page_tokens: int, unit_keys: bytes, seed: int, tenant: bytes = b"") -> None:
        self.tenant = tenant  # whose quota the pages count against where they are stored
        self._page_tokens = page_tokens
        self._given = unit_keys
        # Whatever mixes up the keys of tenants, no one gets a page of another one.
        self._seed = seed ^ int.from_bytes(tenant[:8], "little")
        self._pages: list[PageKey] = []

    def fork(self) -> KeyChain:
        other = copy(self)
        other._pages = list(self._pages)
        return other

    def pages(self, tokens: array[int], count: int) -> list[PageKey]:
        """Keys of the first `count` pages, all full, of `tokens` (int32); none where the chain has no root."""
        for _ in self.walk(tokens, count, len(self._pages)):
            pass
        return self._pages[:count]

    def walk(self, tokens: array[int], count: int, first: int = 0) -> Iterator[PageKey]:
        """As `pages`, from page `first` on, each made when it is asked for."""
        for ordinal in range(first, count if self._given else 0):
            if ordinal == len(self._pages):
                start = ordinal * self._page_tokens
                self._pages.append(self._next(tokens[start : start + self._page_tokens].tobytes()))
            yield self._pages[ordinal]

    def _next(self, page: bytes) -> PageKey:
        units = self._page_tokens // HASH_UNIT_TOKENS * HASH_BYTES
        ordinal, before = len(self._pages), self._pages[-1] if self._pages else None
        parent = before.key if before is not None else b""
        unit_keys = self._given[ordinal * units : (ordinal + 1) * units]
        if len(unit_keys) < units:
            # Units that came with the work are never hashed again: a page may begin with some of them.
            done = len(unit_keys) // HASH_BYTES
            unit_keys += chain_hashes(unit_keys[-HASH_BYTES:] or parent, page[done * HASH_UNIT_TOKENS * TOKEN_BYTES :])
        if before is None:
            return PageKey(unit_keys, page_fingerprint(page, self._seed), page)
        fingerprint = page_fingerprint(page, before.fingerprint)
        return PageKey(unit_keys, fingerprint, page, parent, before.fingerprint, before.tokens)


class PrefixIndex:
    """key -> block, one block per key and one key per block. collisions: lookups that met another page under the key."""

    def __init__(self) -> None:
        self.collisions = 0
        self._blocks: dict[bytes, int] = {}  # by key
        self._pages: dict[int, PageKey] = {}  # block -> key

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, block: int) -> bool:
        return block in self._pages

    def holds(self, block: int, unit_keys: bytes, fingerprint: int, tokens: bytes) -> bool:
        """Whether `block` still is this page."""
        page = self._pages.get(block)
        return page is not None and page.unit_keys == unit_keys and _same(page, fingerprint, tokens)

    def before(self, block: int) -> int | None:
        """The block of the page before that of `block`, if both are indexed."""
        page = self._pages.get(block)
        if page is None or not page.parent:
            return None
        before = self._blocks.get(page.parent, -1)
        # Another page under the parent's key could lead round in a circle.
        there = before >= 0 and _same(self._pages[before], page.parent_fingerprint, page.parent_tokens)
        return before if there else None

    def store(self, block: int, page: PageKey) -> bool:
        """Enters a full page. False if the key or the block is in the index already."""
        if page.key in self._blocks or block in self._pages:
            return False
        self._blocks[page.key] = block
        self._pages[block] = page
        return True

    def forget(self, block: int) -> bytes:
        """Removes `block`; returns the unit keys it was stored under."""
        page = self._pages.pop(block)
        del self._blocks[page.key]
        return page.unit_keys

    def lookup(self, pages: Iterable[PageKey]) -> list[int]:
        """Blocks of the longest indexed prefix of `pages`, of which no more are asked for than the first that is not there."""
        blocks: list[int] = []
        for page in pages:
            block = self._blocks.get(page.key, -1)
            if block < 0:
                break
            if not _same(self._pages[block], page.fingerprint, page.tokens):
                self.collisions += 1
                break
            blocks.append(block)
        return blocks


def _same(page: PageKey, fingerprint: int, tokens: bytes) -> bool:
    """Whether a page under the key that was looked for is the one that was meant."""
    return page.fingerprint == fingerprint and page.tokens == tokens
