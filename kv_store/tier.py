"""Owns what a tier is to the store: pages on one medium under their ids, what is counted of it, and how it fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from kv_store.page import Page, PageBytes, PageId
from pdserve.errors import PdserveError

VerifyFailure = Literal["checksum", "header", "length", "identity", "fingerprint"]
Change = Literal["stored", "evicted"]
TierListener = Callable[[Change, Sequence[Page]], None]  # called in the thread that made the change, outside all locks


class TierFailed(PdserveError):
    """A medium does not work (I/O error, full, unreachable, over its budget). The store turns to its other tiers."""

    reason = "tier_failed"


@dataclass(slots=True)
class TierCounters:
    """Since the start. Pages, unless the name says otherwise. Written by the tier alone."""

    hits: int = 0
    misses: int = 0
    stored: int = 0
    evicted: int = 0
    evicted_age_s: float = 0.0  # sum over evicted pages
    expired: int = 0
    dropped: int = 0  # not stored: back-pressure, quota, no room, or the medium failed
    failures: int = 0  # calls that ended in TierFailed
    bytes_in: int = 0
    bytes_out: int = 0
    read_s: float = 0.0
    write_s: float = 0.0
    verify_failures: Counter[VerifyFailure] = field(default_factory=Counter)


class PageTier(Protocol):
    """Blocking and thread-safe: the store calls it in threads of its own. Contract: tests/kv_store/test_tier_contract.py.

    What `read` counts as good was verified (key, fingerprint, tokens, format, length, xxh3_128); a page that fails is dropped, counted
    and a miss from then on. Nothing here raises for a bad page; TierFailed is for the medium.
    """

    name: str
    counters: TierCounters

    def present(self, ids: Sequence[PageId]) -> int:
        """How many of `ids`, from the first on, are here now."""

    def read(self, ids: Sequence[PageId], into: Sequence[PageBytes]) -> int:
        """Copies pages into `into`, until one is absent or bad; how many are good. What follows them may have been written to."""

    def write(self, pages: Sequence[Page], contents: Sequence[PageBytes]) -> int:
        """Stores the pages that are absent; how many of `pages` are here afterwards (those that were dropped are not)."""

    def remove(self, keys: Sequence[bytes]) -> int:
        """Drops pages; how many there were."""

    def used_bytes(self) -> int: ...

    def close(self) -> None: ...
