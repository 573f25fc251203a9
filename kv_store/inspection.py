"""Owns what operators see of a tier: how full it is, which pages lie there, whether one is still what was stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import Literal, Protocol

from kv_store.page import PageId
from kv_store.tier_index import Entry

Finding = Literal["good", "bad", "absent"]


@dataclass(frozen=True, slots=True)
class Occupancy:
    """capacity_bytes: 0 = without bound. pages: None where nobody counts them."""

    capacity_bytes: int
    used_bytes: int
    pages: int | None


@dataclass(frozen=True, slots=True)
class PageRow:
    """parent: empty at the start of a chain, and where it is not known. refs: readers now. held_s: what is left of a pin."""

    id: PageId
    parent: bytes
    size_bytes: int
    age_s: float
    refs: int = 0
    held_s: float = 0.0


class InspectedTier(Protocol):
    """Blocking and thread-safe, slow with many pages: for threads of its caller. Nothing here counts as a hit or makes a page look
    used. Raises TierFailed where the medium does not work. Contract: tests/kv_store/test_inspection.py."""

    name: str

    def occupancy(self) -> Occupancy: ...

    def keys(self) -> list[bytes]:
        """Of all pages."""

    def rows(self, keys: Sequence[bytes], limit: int) -> list[PageRow]:
        """Of those of `keys` that are here; without keys of any pages, the newest first where that is known."""

    def hold(self, key: bytes, seconds: float) -> bool:
        """Keeps a page for so long, whatever the policy says. False if it is not here."""

    def check(self, key: bytes) -> Finding:
        """Compares a page with what was stored. A bad one is dropped and counted."""


def entry_rows(entries: Iterable[Entry], limit: int, now_s: float) -> list[PageRow]:
    """The newest ones. now_s: of the clock that the index was told."""
    newest = nlargest(limit, entries, key=lambda entry: entry.stored_s)
    return [
        PageRow(
            entry.page.id,
            entry.page.parent,
            entry.size_bytes,
            max(0.0, now_s - entry.stored_s),
            entry.refs,
            max(0.0, entry.held_until_s - now_s),
        )
        for entry in newest
    ]
