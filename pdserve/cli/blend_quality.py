"""Owns how far a blended answer lies from that of the full prefill: KL divergence over the likeliest tokens, top-1 agreement. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.client import TokenLogprobs

LEAST_MASS = 1e-9
LEAST_LOGPROB = -700.0  # of a token that is impossible; e to its power is no 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model must keep to. KL in nats."""

    mean_kl: float
    max_kl: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Compared:
    """One prompt."""

    name: str
    tokens: int
    blended_tokens: int
    kl: float
    agrees: bool


@dataclass(frozen=True, slots=True)
class Quality:
    prompts: int
    mean_kl: float
    max_kl: float
    agreement: float  # share of prompts whose likeliest next token is the same

    @classmethod
    def of(cls, rows: Sequence[Compared]) -> Quality:
        """rows: at least one."""
        divergences = [row.kl for row in rows]
        agreement = sum(row.agrees for row in rows) / len(rows)
        return cls(len(rows), sum(divergences) / len(rows), max(divergences), agreement)

    def failures(self, limits: Limits) -> list[str]:
        """What is not within its limit, in words; empty = passed. A figure that is no number is within none."""
        found: list[str] = []
        if not self.mean_kl <= limits.mean_kl:
            found.append(f"mean KL {self.mean_kl:.3g} nats, allowed {limits.mean_kl:g}")
        if not self.max_kl <= limits.max_kl:
            found.append(f"largest KL {self.max_kl:.3g} nats, allowed {limits.max_kl:g}")
        if not self.agreement >= limits.agreement:
            found.append(f"top-1 agreement {self.agreement:.1%}, needed {limits.agreement:.1%}")
        return found


def kl_nats(full: TokenLogprobs, blended: TokenLogprobs) -> float:
    """Estimate of KL(full || blended) of the next token: over the tokens that the full prefill lists, and all others as one.

    A listed token that the blend does not list counts with the least probability that the blend lists, which is the most it can
    have there. Lumping tokens together can only make a KL smaller, so the true one is larger, by little where the lists hold most of
    the mass. Finite whatever is listed: a verdict on a model that makes tokens impossible must reach the controller, as JSON.
    """
    known = _listed(blended)
    floor = min(known.values())
    total = mass_full = mass_blended = 0.0
    for token, logprob in _listed(full).items():
        other = known.get(token, floor)
        total += math.exp(logprob) * (logprob - other)
        mass_full += math.exp(logprob)
        mass_blended += math.exp(other)
    rest_full, rest_blended = max(1 - mass_full, 0.0), max(1 - mass_blended, LEAST_MASS)
    if rest_full > LEAST_MASS:
        total += rest_full * math.log(rest_full / rest_blended)
    return max(total, 0.0)


def _listed(row: TokenLogprobs) -> dict[int, float]:
    return {token: max(logprob, LEAST_LOGPROB) for token, logprob in zip(row.token_ids, row.logprobs, strict=True)}
