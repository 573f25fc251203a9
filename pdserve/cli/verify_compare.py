"""Owns whether two generations of one prompt are the same. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.client import Choice, Generation


@dataclass(frozen=True, slots=True)
class Comparison:
    """tokens: compared. difference: empty where nothing differs. logprob_error: largest difference of a log-probability."""

    tokens: int
    difference: str
    logprob_error: float


def compare(expected: Generation, got: Generation, tolerance: float) -> Comparison:
    """Token ids and reasons must be equal, log-probabilities within `tolerance`."""
    tokens, worst, difference = 0, 0.0, ""
    if len(expected.choices) != len(got.choices):
        return Comparison(0, f"{len(got.choices)} choices instead of {len(expected.choices)}", 0.0)
    for number, (one, other) in enumerate(zip(expected.choices, got.choices, strict=True)):
        tokens += len(one.token_ids)
        error = _logprob_error(one, other)
        worst = max(worst, error)
        difference = difference or _difference(number, one, other, error, tolerance)
    return Comparison(tokens, difference, worst)


def _difference(number: int, one: Choice, other: Choice, error: float, tolerance: float) -> str:
    if one.token_ids != other.token_ids:
        at = next(
            (i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=False)) if a != b),
            min(len(one.token_ids), len(other.token_ids)),
        )
        return f"choice {number}: token {at} is {_shown(other, at)} instead of {_shown(one, at)}"
    if one.text != other.text:
        return f"choice {number}: equal tokens, other text"
    if one.finish_reason != other.finish_reason:
        return f"choice {number}: finished by {other.finish_reason} instead of {one.finish_reason}"
    if len(one.logprobs) != len(other.logprobs):
        return f"choice {number}: {len(other.logprobs)} log-probabilities instead of {len(one.logprobs)}"
    return f"choice {number}: a log-probability differs by {error:.2g}" if error > tolerance else ""


def _shown(choice: Choice, at: int) -> str:
    return str(choice.token_ids[at]) if at < len(choice.token_ids) else "missing"


def _logprob_error(one: Choice, other: Choice) -> float:
    """Over tokens that both sides list at a position: alternatives that are nearly equal may change places."""
    worst = 0.0
    for mine, theirs in zip(one.logprobs, other.logprobs, strict=False):
        found = dict(zip(theirs.token_ids, theirs.logprobs, strict=True))
        for token, logprob in zip(mine.token_ids, mine.logprobs, strict=True):
            if token in found:
                worst = max(worst, abs(logprob - found[token]))
    return worst
