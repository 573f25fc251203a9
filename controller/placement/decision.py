"""Owns the record of one placement: what was asked, every candidate with its terms or its refusal, what was picked. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from controller.placement.snapshot import Reused

CandidateKind = Literal["split", "local", "last_resort"]


@dataclass(frozen=True, slots=True)
class Pick:
    """Where a dispatch goes. "split": prefill on one worker, decode on another; else both on `decode_worker`."""

    kind: CandidateKind
    prefill_worker: str
    decode_worker: str
    transport: str  # empty unless split


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to serve the dispatch. Either `refusal` is empty and the terms add up to `score` (less is better), or it says why not.
    device_tokens, stored_tokens: held where the prompt would be computed, on the device and in the tiers; pulled_tokens: from `peer`.

    One side alone is recorded where it was refused before pairs were formed: the other worker's name is empty then.
    """

    kind: CandidateKind
    prefill_worker: str
    decode_worker: str
    transport: str
    score: float | None
    terms: Mapping[str, float]
    refusal: str
    message: str
    device_tokens: int = 0
    stored_tokens: int = 0
    pulled_tokens: int = 0
    peer: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision. `reason` is a constant name: "best", "only", "tie", "forced", "last_resort", or why nobody could be picked."""

    attempt: int  # of the dispatch; 0 where none was made
    at_s: float  # after the arrival of the request
    policy: str
    reason: str
    picked: Pick | None
    candidates: tuple[Candidate, ...]
    candidates_left_out: int
    reused: Reused = "prefix"  # what the candidates hold tokens of
    recomputed_tokens: int = 0  # of chunks, wherever they are held
