"""Owns what a stored page is worth: seconds to compute it again by its place in the prompt, and what a tier saves of them. Pure.

Algorithm card 6: benefit = max(0, min(recompute, load from the next tier) - load here).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kv_store.split import Speed

LEAST_BENEFIT_S = 1e-9  # of a page that is worth nothing where it is; 0 would say that nothing was measured
_WEIGHT = 0.1  # of the newest measurement


@dataclass(slots=True)
class ComputeCost:
    """What computing a page takes: 1 + growth * (pages before it), scaled to what was measured.

    growth: share of the first page's compute that each page before adds, as attention goes over all of them. Only the mean over the
    pages of the last steps is measured; the pages that were offered last are taken for those, so the mean is that of a page as deep
    as they are on average. page_s: 0 = not measured. ordinal: of that page.
    """

    growth: float = 0.0
    page_s: float = 0.0
    ordinal: float = 0.0
    offers: int = 0

    def measured(self, page_s: float) -> None:
        if page_s > 0:
            self.page_s = page_s

    def offered(self, ordinals: Sequence[int]) -> None:
        """Pages with so many before them in their prompts were computed."""
        if not ordinals:
            return
        mean = sum(ordinals) / len(ordinals)
        self.ordinal += (mean - self.ordinal) * (_WEIGHT if self.offers else 1.0)
        self.offers += 1

    def of(self, ordinal: int) -> float:
        """Seconds for the page with `ordinal` pages before it; 0 = not measured."""
        return self.page_s * (1.0 + self.growth * ordinal) / (1.0 + self.growth * self.ordinal)


def benefit_s(recompute_s: float, here: Speed, below: Sequence[Speed]) -> float:
    """Seconds that a hit in a tier saves over the next best source. below: of the lower tiers that get the page too, nearest first.

    0, which is no value, where computing, this tier or the next one was not measured yet; tiers further down count once they are.
    """
    return benefits_s([recompute_s], here, below)[0]


def benefits_s(recomputes_s: Sequence[float], here: Speed, below: Sequence[Speed]) -> list[float]:
    """`benefit_s` of each page, by the speeds of one moment."""
    if not all(speed.samples for speed in (here, *below[:1])):
        return [0.0] * len(recomputes_s)
    below_s, here_s = min((speed.page_s for speed in below if speed.samples), default=float("inf")), here.page_s
    return [
        max(min(recompute_s, below_s) - here_s, LEAST_BENEFIT_S) if recompute_s > 0 else 0.0
        for recompute_s in recomputes_s
    ]
