"""Owns the batching policy of a worker that holds the decode role: large batches, short chunks, blocks for growth. Pure."""

from __future__ import annotations

import math

from engine.protocol import SetPolicy
from service_kit.config import EngineConfig

CHUNK_SHARE = 4  # a prompt computed beside running decodes may take a quarter of the usual chunk per step
MIN_CHUNK_TOKENS = 16


def policy(engine: EngineConfig, blocks_total: int) -> SetPolicy:
    """Decodes first; a chunk of a local prefill is short, because it lengthens the step of every running sequence.
    Unchunked (0) stays unchunked: whoever configured that wants whole prompts."""
    chunk = engine.prefill_chunk
    return SetPolicy(
        token_budget=engine.token_budget,
        max_running=engine.max_running,
        prefill_chunk=max(MIN_CHUNK_TOKENS, chunk // CHUNK_SHARE) if chunk else 0,
        decode_headroom_blocks=math.ceil(engine.decode_headroom * blocks_total),
    )
