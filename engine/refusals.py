"""Owns what an engine refuses: work that can never run, and dispatches whose cancel came first. Pure; all engines use it."""

from __future__ import annotations

import numpy as np

from engine.protocol import Dispatch, Work
from pdserve.errors import Cancelled, InvalidRequest, NoCapacity, PdserveError, PromptTooLong

TOMBSTONE_S = 20.0  # twice the KV lease


class Doorkeeper:
    """Knows the engine's limits and the dispatches that were cancelled lately."""

    def __init__(self, max_context_tokens: int, page_tokens: int, blocks: int, vocab: int) -> None:
        self._max_context_tokens = max_context_tokens
        self._page_tokens = page_tokens
        self._blocks = blocks
        self._vocab = vocab
        self._until_s: dict[Dispatch, float] = {}

    def bury(self, dispatch: Dispatch, now_s: float) -> None:
        """Leaves a tombstone: work that arrives after its own cancel is refused."""
        self._until_s.pop(dispatch, None)
        self._until_s[dispatch] = now_s + TOMBSTONE_S
        # Dicts keep insertion order and every tombstone lasts equally long, so the first is the oldest.
        while self._until_s[oldest := next(iter(self._until_s))] <= now_s:
            del self._until_s[oldest]

    def refusal(self, work: Work, now_s: float) -> PdserveError | None:
        """Why `work` could not run even in an idle engine; None if it could."""
        if self._until_s.get(work.dispatch, now_s) > now_s:
            return Cancelled("The dispatch was cancelled before it arrived.")
        tokens = len(work.token_ids) // 4
        if not 0 < work.prompt_tokens <= tokens or not work.choices:
            return InvalidRequest("Work needs a prompt and at least one choice.")
        ids = np.frombuffer(work.token_ids, dtype="<i4", count=tokens)
        if ids.min() < 0 or ids.max() >= self._vocab:
            return InvalidRequest(f"Token ids must lie in 0 .. {self._vocab - 1}.", param="prompt")
        if work.blend is not None and not _chunks_fit(work):
            return InvalidRequest("Chunks must lie one after the other inside the prompt.", param="chunks")
        if tokens - work.prompt_tokens >= work.sampling.max_tokens:
            return InvalidRequest("The output accepted so far fills max_tokens already.", param="max_tokens")
        if tokens >= self._max_context_tokens:
            return PromptTooLong.of(tokens + 1, self._max_context_tokens)
        needed = -(-(tokens + 1) // self._page_tokens)
        if needed > self._blocks:
            return NoCapacity(f"The KV pool has {self._blocks} blocks, but the request needs {needed}.")
        return None


def _chunks_fit(work: Work) -> bool:
    """The prompt's last token belongs to no chunk: it is always computed."""
    end = 0
    for chunk in work.chunks:
        if chunk.start < end or chunk.count < 1:
            return False
        end = chunk.start + chunk.count
    return bool(work.chunks) and end < work.prompt_tokens and not work.block_hashes
