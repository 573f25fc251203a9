"""Owns whether this worker takes a prompt to prefill now. Pure."""

from __future__ import annotations

from engine.protocol import Load, Work
from kv_transfer.keys import TOKEN_BYTES
from pdserve.errors import NoCapacity, PdserveError
from worker_runtime.holding import Holding

QUEUED_STEPS = 64  # prompts of so many full steps may wait here; the controller holds the longer queue


def refusal(work: Work, holding: Holding, load: Load, token_budget: int) -> PdserveError | None:
    """Why not; None = taken. A prompt of any length is taken while none waits."""
    if (not_held := holding.refusal("prefill")) is not None:
        return not_held
    waiting = load.waiting_tokens
    if waiting and waiting + len(work.token_ids) // TOKEN_BYTES > QUEUED_STEPS * token_budget:
        return NoCapacity(f"{waiting} prompt tokens wait here already.")
    return None
