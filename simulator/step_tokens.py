"""Owns the columns of one step's tokens: draws a token, says whether it ends its choice, collects the row."""

from __future__ import annotations

from engine.protocol import EventSink, LogprobRow, PromptLogprobs, StepTokens, Work
from simulator.token_draw import Vocabulary, draw_token, logprob_row, stream_key

GOES_ON, STOP, LENGTH = 0, 1, 2


class StepColumns:
    """One StepTokens message in the making."""

    def __init__(self, step: int, vocabulary: Vocabulary, max_context_tokens: int) -> None:
        self._step = step
        self._vocabulary = vocabulary
        self._max_context_tokens = max_context_tokens
        self._rows: list[tuple[int, int, int, int, int, int]] = []
        self._logprobs: list[LogprobRow | None] = []

    def draw(self, work: Work, choice: int, key: bytes, index: int, length: int) -> tuple[int, int]:
        """Token at output index `index` of a choice whose KV holds `length` tokens. Returns (token id, finish)."""
        sampling = work.sampling
        ends = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            ends |= frozenset(self._vocabulary.eos_token_ids)
        token_id = draw_token(self._vocabulary, key, index, banned=ends if index < sampling.min_tokens else ())
        finish = GOES_ON
        if token_id in ends:
            finish = STOP
        elif index + 1 >= sampling.max_tokens or length + 1 >= self._max_context_tokens:
            finish = LENGTH
        dispatch = work.dispatch
        self._rows.append((dispatch.request_key, dispatch.attempt, choice, index, token_id, finish))
        row = None
        if sampling.logprobs is not None:
            row = logprob_row(self._vocabulary, key, index, token_id, sampling.logprobs)
        self._logprobs.append(row)
        return token_id, finish

    def emit(self, sink: EventSink) -> None:
        if not self._rows:
            return
        keys, attempts, choices, indices, token_ids, finish = zip(*self._rows, strict=True)
        logprobs = tuple(self._logprobs) if any(row is not None for row in self._logprobs) else ()
        sink.emit(StepTokens(self._step, keys, attempts, choices, indices, token_ids, finish, logprobs))


def prompt_logprobs(work: Work, vocabulary: Vocabulary) -> PromptLogprobs:
    """Made-up rows for prompt tokens 1 .. n-1. Only for work that asks for them."""
    assert work.sampling.prompt_logprobs is not None
    token_ids = memoryview(work.token_ids)[: work.prompt_tokens * 4].cast("i")
    key = stream_key(work, 0) + b"prompt"
    alternatives = work.sampling.prompt_logprobs
    rows = tuple(
        logprob_row(vocabulary, key, position, token_ids[position], alternatives)
        for position in range(1, work.prompt_tokens)
    )
    return PromptLogprobs(work.dispatch, rows)
