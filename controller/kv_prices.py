"""Owns what reading KV costs a worker that could compute it: measured seconds per page against its measured speed. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kv_transfer.keys import HASH_UNIT_TOKENS
from pdserve.v1 import worker_pb2

MICROSECONDS = 1e-6
GUESSED_SHARE = 0.1  # of computing what is loaded, until both were measured


@dataclass(frozen=True, slots=True)
class KvPrices:
    """tiers: by name, nearest first: tokens that the worker computes in the time in which it loads one of that tier. At most 1: it
    computes what it would load more slowly."""

    tiers: Mapping[str, float] = field(default_factory=dict)

    def of_tier(self, tier: str) -> float:
        """Of one that is not among them, the guess."""
        return self.tiers.get(tier, GUESSED_SHARE)


NOTHING_MEASURED = KvPrices()


def prices_of(load: worker_pb2.LoadReport, block_tokens: int) -> KvPrices:
    token_s = load.prefill_token_us * MICROSECONDS
    return KvPrices(
        {tier: _price(seconds, token_s) for tier, seconds in unit_seconds(load.tiers, block_tokens).items()}
    )


def _price(unit_s: float, token_s: float) -> float:
    if not unit_s or not token_s:
        return GUESSED_SHARE
    return min(1.0, unit_s / (HASH_UNIT_TOKENS * token_s))


def unit_seconds(tiers: Sequence[worker_pb2.TierReport], block_tokens: int) -> dict[str, float]:
    """Of reading a hash unit from each tier, nearest first; 0 where nothing was read yet."""
    share = HASH_UNIT_TOKENS / block_tokens
    return {tier.tier: share * tier.read_s / tier.read_pages if tier.read_pages else 0.0 for tier in tiers}
