"""Owns what a worker's chunks spare a prompt that is blended from them, and what it computes of them all the same. Pure.

A chunk is used whole or not at all: where a unit of it is nowhere, the worker computes it alone first. Redis is the same for all
workers, so that what lies only there distinguishes none and is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

from controller.blend_ratio import FLOOR, MOST_COMPUTED
from controller.kv_blend import KvBlend, Recipe
from controller.kv_holdings import DEVICE_TIER, KvHoldings
from controller.kv_prices import KvPrices
from controller.placement.snapshot import Reuse
from kv_transfer.keys import HASH_UNIT_TOKENS


@dataclass(frozen=True, slots=True)
class WantedChunk:
    """keys: of its hash units."""

    tokens: int
    keys: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class BlendDemand:
    """What placement asks of a blended prompt. recomputed_tokens: of its chunks, computed anew wherever they lie, as tokens of a whole
    prefill. beside_tokens: as many are computed beside the load of the chunks, which is hidden so far."""

    chunks: tuple[WantedChunk, ...]
    recomputed_tokens: int
    beside_tokens: float


def blend_demand(
    asked: KvBlend, keys: Sequence[Sequence[bytes]], prompt_tokens: int, layers: int
) -> BlendDemand | None:
    """keys: of each chunk. None where engines compute the prompt whole. A ratio that is still to be chosen counts as the floor."""
    counts = [chunk.end - chunk.start for chunk in asked.chunks]
    recomputed = _recomputed(asked.recipe, counts, layers)
    if prompt_tokens - sum(counts) + recomputed > MOST_COMPUTED * prompt_tokens:
        return None
    beside = (
        prompt_tokens / layers if asked.recipe.method == "blend" else 0.0
    )  # EPIC reads the chunks in the first layer
    return BlendDemand(tuple(map(WantedChunk, counts, keys)), round(recomputed), beside)


def _recomputed(recipe: Recipe, counts: Sequence[int], layers: int) -> float:
    """As `engine.blend_selection` has it: CacheBlend computes two layers whole, and of the others a share."""
    if recipe.method == "epic":
        return sum(min(recipe.first_tokens, tokens) for tokens in counts)
    ratio = FLOOR if recipe.ratio == "auto" else recipe.ratio
    return sum(counts) * (1 - (1 - ratio) * max(layers - 2, 0) / layers)


def chunk_reuse(demand: BlendDemand, holdings: KvHoldings, prices: KvPrices) -> Reuse:
    device = stored = 0
    load = 0.0
    for chunk in demand.chunks:
        units = holdings.units_by_tier(chunk.keys, prices.tiers)
        if units is None:
            continue
        if units.pop(DEVICE_TIER) < len(chunk.keys):
            stored += chunk.tokens
            cost = HASH_UNIT_TOKENS * sum(count * prices.of_tier(tier) for tier, count in units.items())
            load += min(chunk.tokens, cost)
        else:
            device += chunk.tokens
    return Reuse(device, stored, max(0.0, load - demand.beside_tokens))


class _Found(NamedTuple):
    changes: int  # of the holdings
    prices: KvPrices
    reuse: Reuse


class RememberedReuse:
    """What each worker spares one prompt that waits: looked up anew only where that worker's holdings or prices have changed, for
    it is asked for at every report of every worker. Forgets holdings that are gone."""

    def __init__(self, demand: BlendDemand) -> None:
        self.demand = demand
        self._found: WeakKeyDictionary[KvHoldings, _Found] = WeakKeyDictionary()

    def at(self, holdings: KvHoldings, prices: KvPrices) -> Reuse:
        found = self._found.get(holdings)
        if found is None or found.changes != holdings.changes or not _same_price(found, prices):
            reuse = chunk_reuse(self.demand, holdings, prices)
            found = self._found[holdings] = _Found(holdings.changes, prices, reuse)
        return found.reuse


def _same_price(found: _Found, prices: KvPrices) -> bool:
    """What need not be loaded has no price."""
    return found.prices is prices or not found.reuse.stored_tokens or found.prices.tiers == prices.tiers
