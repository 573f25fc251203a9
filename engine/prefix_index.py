"""Owns the prefix index of the device pool: which block holds the KV of which chained key. Pure.

Next to the key an independent fingerprint of the tokens is stored (keyed xxh3, chained over the pages like the key itself) and
compared on every hit: a collision or a mix-up of keys is then a miss, never another prompt's KV.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import xxhash

from kv_transfer.keys import HASH_BYTES, HASH_UNIT_TOKENS, TOKEN_BYTES, chain_hashes


@dataclass(frozen=True, slots=True)
class PageKey:
    """Names one full page. unit_keys: chained keys of its hash units, the last one is the page's key. parent,
    parent_fingerprint: of the page before it; empty at the start of a chain."""

    unit_keys: bytes
    fingerprint: int
    parent: bytes = b""
    parent_fingerprint: int = 0

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
        while self._given and len(self._pages) < count:
            start = len(self._pages) * self._page_tokens
            self._pages.append(self._next(tokens[start : start + self._page_tokens].tobytes()))
        return self._pages[:count]

    def _next(self, page: bytes) -> PageKey:
        units = self._page_tokens // HASH_UNIT_TOKENS * HASH_BYTES
        ordinal, parent = len(self._pages), self._pages[-1].key if self._pages else b""
        unit_keys = self._given[ordinal * units : (ordinal + 1) * units]
        if len(unit_keys) < units:
            # Units that came with the work are never hashed again: a page may begin with some of them.
            done = len(unit_keys) // HASH_BYTES
            unit_keys += chain_hashes(unit_keys[-HASH_BYTES:] or parent, page[done * HASH_UNIT_TOKENS * TOKEN_BYTES :])
        seed = self._pages[-1].fingerprint if self._pages else self._seed
        return PageKey(unit_keys, xxhash.xxh3_64_intdigest(page, seed), parent, seed if parent else 0)


class PrefixIndex:
    """key -> block, one block per key and one key per block. collisions: lookups that met another page under the key."""

    def __init__(self) -> None:
        self.collisions = 0
        self._blocks: dict[bytes, tuple[int, int]] = {}  # key -> (block, fingerprint)
        self._pages: dict[int, PageKey] = {}  # block -> key

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, block: int) -> bool:
        return block in self._pages

    def holds(self, block: int, unit_keys: bytes, fingerprint: int) -> bool:
        """Whether `block` still is this page."""
        page = self._pages.get(block)
        return page is not None and page.unit_keys == unit_keys and page.fingerprint == fingerprint

    def before(self, block: int) -> int | None:
        """The block of the page before that of `block`, if both are indexed."""
        page = self._pages.get(block)
        if page is None or not page.parent:
            return None
        before, fingerprint = self._blocks.get(page.parent, (-1, 0))
        # Another page under the parent's key could lead round in a circle.
        return before if before >= 0 and fingerprint == page.parent_fingerprint else None

    def store(self, block: int, page: PageKey) -> bool:
        """Enters a full page. False if the key or the block is in the index already."""
        if page.key in self._blocks or block in self._pages:
            return False
        self._blocks[page.key] = (block, page.fingerprint)
        self._pages[block] = page
        return True

    def forget(self, block: int) -> bytes:
        """Removes `block`; returns the unit keys it was stored under."""
        page = self._pages.pop(block)
        del self._blocks[page.key]
        return page.unit_keys

    def lookup(self, pages: Sequence[PageKey]) -> list[int]:
        """Blocks of the longest indexed prefix of `pages`."""
        blocks: list[int] = []
        for page in pages:
            block, fingerprint = self._blocks.get(page.key, (-1, 0))
            if block < 0:
                break
            if fingerprint != page.fingerprint:
                self.collisions += 1
                break
            blocks.append(block)
        return blocks
