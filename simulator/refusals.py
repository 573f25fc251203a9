"""Owns what a modelled engine refuses: work that can never run, and dispatches whose cancel came first. Pure."""

from __future__ import annotations

from engine.protocol import Dispatch, Work
from pdserve.errors import InvalidRequest, NoCapacity, PdserveError, PromptTooLong
from simulator.block_tables import BlockTables


def refusal(work: Work, max_context_tokens: int, tables: BlockTables) -> PdserveError | None:
    """Why `work` could not run even in an idle engine; None if it could."""
    tokens = len(work.token_ids) // 4
    if not 0 < work.prompt_tokens <= tokens or not work.choices:
        return InvalidRequest("Work needs a prompt and at least one choice.")
    if tokens - work.prompt_tokens >= work.sampling.max_tokens:
        return InvalidRequest("The output accepted so far fills max_tokens already.", param="max_tokens")
    if tokens >= max_context_tokens:
        return PromptTooLong.of(tokens + 1, max_context_tokens)
    blocks = tables.blocks_for(tokens + 1)
    if blocks > tables.pool.size:
        return NoCapacity(f"The KV pool has {tables.pool.size} blocks, but the request needs {blocks}.")
    return None


class Tombstones:
    """Dispatches cancelled lately, so that work arriving after its own cancel is refused."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._until_s: dict[Dispatch, float] = {}

    def bury(self, dispatch: Dispatch, now_s: float) -> None:
        self._until_s.pop(dispatch, None)
        self._until_s[dispatch] = now_s + self._ttl_s
        # Dicts keep insertion order and every tombstone lasts equally long, so the first is the oldest.
        while self._until_s[oldest := next(iter(self._until_s))] <= now_s:
            del self._until_s[oldest]

    def covers(self, dispatch: Dispatch, now_s: float) -> bool:
        return self._until_s.get(dispatch, now_s) > now_s
