"""Owns what the ratio of a blend is chosen by: the speeds of the worker that will compute it, and where it holds the chunks. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from controller.blend_ratio import BlendCost
from controller.kv_blend import KvBlend
from controller.kv_holdings import DEVICE_TIER
from controller.kv_prices import MICROSECONDS, unit_seconds
from controller.worker_record import WorkerRecord


def cost_of(asked: KvBlend, keys: Sequence[bytes], prompt_tokens: int, record: WorkerRecord) -> BlendCost:
    """keys: of each chunk. record: of the worker that will compute it."""
    unit_s = unit_seconds(record.load.tiers, record.view().block_tokens)
    return BlendCost(
        prompt_tokens=prompt_tokens,
        chunk_tokens=sum(chunk.end - chunk.start for chunk in asked.chunks),
        layers=sum(group.layer_count for group in record.info.layout),
        token_s=record.load.prefill_token_us * MICROSECONDS,
        load_s=sum(_load_s(record.holdings.tiers_of_units(each), unit_s) for each in keys),
    )


def _load_s(units: Sequence[Set[str]], unit_s: Mapping[str, float]) -> float:
    """Of one chunk, each unit from the nearest tier. A chunk of which a unit is nowhere is not loaded but computed."""
    if not all(units):
        return 0.0
    below = [tiers for tiers in units if DEVICE_TIER not in tiers]
    return sum(next((seconds for tier, seconds in unit_s.items() if tier in tiers), 0.0) for tiers in below)
