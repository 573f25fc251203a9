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
    computes what it would load more slowly. peers: the same for those that it has pulled from."""

    tiers: Mapping[str, float] = field(default_factory=dict)
    peers: Mapping[str, float] = field(default_factory=dict)

    def of_tier(self, tier: str) -> float:
        """Of one that is not among them, the guess."""
        return self.tiers.get(tier, GUESSED_SHARE)

    def of_peer(self, worker_id: str) -> float:
        """Of one that it never pulled from the mean of the others; without any it is taken to compute."""
        known = self.peers.get(worker_id)
        if known is not None:
            return known
        return sum(self.peers.values()) / len(self.peers) if self.peers else 1.0


NOTHING_MEASURED = KvPrices()


def prices_of(load: worker_pb2.LoadReport, block_tokens: int) -> KvPrices:
    token_s = load.prefill_token_us * MICROSECONDS
    if not token_s:
        return KvPrices(dict.fromkeys((tier.tier for tier in load.tiers), GUESSED_SHARE))
    unit_s = HASH_UNIT_TOKENS * token_s
    tiers = unit_seconds(load.tiers, block_tokens).items()
    page_s = block_tokens * token_s
    return KvPrices(
        {tier: min(1.0, seconds / unit_s) if seconds else GUESSED_SHARE for tier, seconds in tiers},
        {each.worker_id: min(1.0, each.page_us * MICROSECONDS / page_s) for each in load.loads.pull_speeds},
    )


def unit_seconds(tiers: Sequence[worker_pb2.TierReport], block_tokens: int) -> dict[str, float]:
    """Of reading a hash unit from each tier, nearest first; 0 where nothing was read yet."""
    share = HASH_UNIT_TOKENS / block_tokens
    return {tier.tier: share * tier.read_s / tier.read_pages if tier.read_pages else 0.0 for tier in tiers}
