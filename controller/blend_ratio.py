"""Owns the choice of a blend's ratio from measured speeds, and whether a blend is worth it at all. Pure.

The rule is CacheBlend's (EuroSys'25): compute as much anew as takes as long as loading the rest, and never less than what the
quality needs. Here only the first layer runs beside the load, so that a ratio above the floor costs time: it is taken only where
the blend stays faster than a whole prefill.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FLOOR = 0.15  # below it the quality is not that of the whole prefill: docs/blend.md
CAP = 0.5  # above it a blend is hardly better, and hardly faster than a whole prefill
MOST_COMPUTED = (
    0.8  # engines compute a prompt whole where a blend would compute a larger share of it: `engine.blend_jobs`
)
_STEPS = 100  # a ratio is told in hundredths, so that a request can ask for the same one again


@dataclass(frozen=True, slots=True)
class BlendCost:
    """What is to be blended, and what was measured where it will be. chunk_tokens: those of `prompt_tokens` that are in chunks.
    token_s: of a whole prefill, all layers; 0: not measured yet. load_s: of the chunks' pages that lie below the device."""

    prompt_tokens: int
    chunk_tokens: int
    layers: int
    token_s: float
    load_s: float

    @property
    def whole_s(self) -> float:
        return self.prompt_tokens * self.token_s

    @property
    def recompute_s(self) -> float:
        """Of all chunk tokens in the layers in which they may be left out: all but the first two."""
        return self.chunk_tokens * self.token_s * max(self.layers - 2, 0) / max(self.layers, 1)

    def computed_s(self, ratio: float) -> float:
        return self.whole_s - (1 - ratio) * self.recompute_s

    def blend_s(self, ratio: float) -> float:
        """As if chunks that are nowhere were there: computing those once is spent for later prompts too."""
        first_s = self.whole_s / max(self.layers, 1)
        return self.computed_s(ratio) + max(0.0, self.load_s - first_s)


@dataclass(frozen=True, slots=True)
class RatioChoice:
    """ratio: None = the prompt is computed whole, exactly. Seconds as predicted, of the blend at `ratio`, or at the floor where it was
    not worth it; 0 where nothing was measured yet."""

    ratio: float | None
    load_s: float
    blend_s: float
    whole_s: float


def choose_ratio(cost: BlendCost) -> RatioChoice:
    """The ratio at which recomputation takes as long as loading, if the blend is faster than a whole prefill with it; else the floor,
    if it is faster with that; else none. Without measurements the floor."""
    balanced = _balanced(cost)
    if cost.computed_s(balanced) > MOST_COMPUTED * cost.whole_s:
        balanced = FLOOR
    for ratio in (balanced, FLOOR):
        choice = RatioChoice(ratio, cost.load_s, cost.blend_s(ratio), cost.whole_s)
        if choice.blend_s < choice.whole_s or not cost.token_s:
            return choice
    return RatioChoice(None, cost.load_s, cost.blend_s(FLOOR), cost.whole_s)


def _balanced(cost: BlendCost) -> float:
    if not cost.recompute_s:
        return FLOOR
    return min(max(math.floor(_STEPS * cost.load_s / cost.recompute_s) / _STEPS, FLOOR), CAP)
