"""Owns whether this worker takes a request to decode now: reserved after a remote prefill, or computed here. Pure."""

from __future__ import annotations

from engine.protocol import Load, Work
from kv_transfer.keys import TOKEN_BYTES
from pdserve.errors import NoCapacity, PdserveError
from worker_runtime.holding import Holding

QUEUED_STEPS = 64  # prompts of so many full steps may wait here for their local prefill
QUEUED_BATCHES = 2  # sequences held may fill so many batches: one that runs, one that is reserved or waits


def reserve_refusal(work: Work, holding: Holding, sequences: int, max_running: int) -> PdserveError | None:
    """Why no blocks are asked of the engine; None = they are, and the engine's pool decides.

    sequences: choices that this worker computes or holds blocks for.
    """
    if (not_held := holding.refusal("decode")) is not None:
        return not_held
    if sequences + len(work.choices) > QUEUED_BATCHES * max_running:
        return NoCapacity(f"{sequences} sequences are held here already.")
    return None


def generate_refusal(work: Work, holding: Holding, load: Load, token_budget: int) -> PdserveError | None:
    """Why a prompt is not computed here; None = taken, whatever the roles: the controller may use any worker for that.
    A prompt of any length is taken while none waits."""
    if (draining := holding.refusal(None)) is not None:
        return draining
    waiting = load.waiting_tokens
    if waiting and waiting + len(work.token_ids) // TOKEN_BYTES > QUEUED_STEPS * token_budget:
        return NoCapacity(f"{waiting} prompt tokens wait here already.")
    return None
