"""Owns the batching policy of a worker that holds the prefill role: full steps of prompts, nothing kept back. Pure."""

from __future__ import annotations

from engine.protocol import SetPolicy
from service_kit.config import EngineConfig


def policy(engine: EngineConfig) -> SetPolicy:
    """Prompts in order of arrival under the token budget. Sequences leave after their first token, so that no block needs
    to be kept back for growth."""
    return SetPolicy(
        token_budget=engine.token_budget,
        max_running=engine.max_running,
        prefill_chunk=engine.prefill_chunk,
        decode_headroom_blocks=0,
    )
