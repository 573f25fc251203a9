"""Owns the decision how much of a prompt to load and how much to compute. Pure.

Algorithm card 6: k* = argmin over split points k of load(0..k) + prefill(k..n). Speeds are measured (`Speed`), not configured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_WEIGHT = 0.2  # of the newest measurement


@dataclass(slots=True)
class Speed:
    """Running averages of what one source costs: seconds per call and per page."""

    page_s: float
    call_s: float = 0.0
    samples: int = 0

    def measured(self, pages: int, seconds: float) -> None:
        """A call that gave `pages` pages took so long. The first measurement replaces the guess."""
        if pages < 1:
            return
        page_s = seconds / pages
        self.page_s = page_s if not self.samples else self.page_s + _WEIGHT * (page_s - self.page_s)
        self.samples += 1


@dataclass(frozen=True, slots=True)
class Run:
    """`pages` pages in a row whose nearest tier is `tier`."""

    tier: str
    pages: int


@dataclass(frozen=True, slots=True)
class Split:
    """load_pages: k*. load_s, compute_s: predicted for loading them and for computing the rest."""

    load_pages: int
    load_s: float
    compute_s: float


def best_split(runs: Sequence[Run], missing_pages: int, speeds: dict[str, Speed], compute_page_s: float) -> Split:
    """The split of `missing_pages` pages, the first of which lie in `runs`, that takes the least time."""
    best = Split(0, 0.0, missing_pages * compute_page_s)
    load_s, pages = 0.0, 0
    for run in runs:
        speed = speeds[run.tier]
        load_s += speed.call_s + run.pages * speed.page_s
        pages += run.pages
        compute_s = (missing_pages - pages) * compute_page_s
        if load_s + compute_s < best.load_s + best.compute_s:
            best = Split(pages, load_s, compute_s)
    return best
