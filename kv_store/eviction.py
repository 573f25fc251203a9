"""Owns what an eviction policy is to a tier. Pure. The choice of one by name: kv_store/policies.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Evictable = Callable[[bytes], bool]


class EvictionPolicy(Protocol):
    """Orders the pages of one tier. Contract: tests/kv_store/test_eviction_contract.py.

    A page may be evicted only while nobody reads it and none of its children is in the tier (leaves first, so that chains stay
    closed under prefix); the tier says so through `evictable`.
    """

    def added(self, key: bytes, size_bytes: int, saving_s: float) -> None:
        """A page came in. saving_s: seconds that one hit saves over the next best source; 0: not measured."""

    def hit(self, key: bytes) -> None:
        """A request read a page; what else looks at it or copies it is no hit. The pages of a chain are told last page first: a
        parent is never older than its child."""

    def victim(self, evictable: Evictable) -> bytes | None:
        """The page to evict next; None where no page is evictable. The caller removes it."""

    def bared(self, key: bytes) -> None:
        """No page here has this one for its parent any more. It may be unknown, as a parent that never came."""

    def removed(self, key: bytes) -> None:
        """A page left: as the last victim, or because it was dropped."""
