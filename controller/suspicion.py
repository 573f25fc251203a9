"""Owns the blame for the death of a worker: which of the prompts it had may have killed it, and which is poison. Pure.

Suspected are the prompts that its engine computed; where it computed none, those that waited there. Poison is the one among them
that was suspected at an earlier death too; having waited is weaker evidence, and takes two earlier ones: workers may all die of
something else at once, and a prompt that comes just then waits at several of them. Placement keeps those that were apart, so that
there is one at most: a prompt that kills whatever computes it kills two workers, never a third, and an innocent one is refused only
where two workers died while they computed it and no other prompt was at both deaths.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Blame: TypeAlias = Literal["none", "suspect", "poison"]


@dataclass(frozen=True, slots=True)
class Present:
    """A request whose prompt the dead worker had and had not finished. May come more than once: its choices can be apart."""

    key: int
    computing: bool  # its engine had begun with it
    deaths: int  # earlier ones at which it was suspected


def blame(present: Iterable[Present]) -> dict[int, Blame]:
    """By request; who is not in it is not to blame."""
    everybody = list(present)
    computed = {each.key: each.deaths for each in everybody if each.computing}
    suspects = computed or {each.key: each.deaths for each in everybody}
    enough = 1 if computed else 2
    again = [key for key, deaths in suspects.items() if deaths >= enough]
    # Two that were at earlier deaths came together before these were known: they are told apart at the next one.
    poison = again[0] if len(again) == 1 else None
    return {key: "poison" if key == poison else "suspect" for key in suspects}
