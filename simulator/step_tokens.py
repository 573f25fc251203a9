"""Owns the tokens of one modelled step: draws them and puts them into the columns."""

from __future__ import annotations

from engine.protocol import EventSink, LogprobRow, PromptLogprobs, Work
from engine.step_tokens import StepColumns
from simulator.token_draw import Vocabulary, draw_token, logprob_row, stream_key


class StepDraws:
    def __init__(self, step: int, vocabulary: Vocabulary, max_context_tokens: int) -> None:
        self._vocabulary = vocabulary
        self._columns = StepColumns(step, vocabulary.eos_token_ids, max_context_tokens)

    def draw(self, work: Work, choice: int, key: bytes, index: int) -> tuple[int, bool]:
        """Token at output index `index` of a choice. Returns (token id, whether the choice goes on)."""
        sampling = work.sampling
        ends = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            ends |= frozenset(self._vocabulary.eos_token_ids)
        token_id = draw_token(self._vocabulary, key, index, banned=ends if index < sampling.min_tokens else ())
        row: LogprobRow | None = None
        if sampling.logprobs is not None:
            row = logprob_row(self._vocabulary, key, index, token_id, sampling.logprobs)
        return token_id, self._columns.add(work, choice, index, token_id, row)

    def emit(self, sink: EventSink) -> None:
        message = self._columns.message()
        if message is not None:
            sink.emit(message)


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
