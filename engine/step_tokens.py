"""Owns the columns of one step's tokens: says whether a token ends its choice, and collects the rows of one StepTokens."""

from __future__ import annotations

from collections.abc import Sequence

from engine.protocol import LogprobRow, StepTokens, Work

GOES_ON, STOP, LENGTH = 0, 1, 2


class StepColumns:
    """One StepTokens message in the making."""

    def __init__(self, step: int, eos_token_ids: Sequence[int], max_context_tokens: int) -> None:
        self._step = step
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_context_tokens = max_context_tokens
        self._rows: list[tuple[int, int, int, int, int, int]] = []
        self._logprobs: list[LogprobRow | None] = []

    def add(self, work: Work, choice: int, index: int, token_id: int, logprobs: LogprobRow | None) -> bool:
        """Takes the token at output index `index`. Returns whether its choice goes on."""
        sampling = work.sampling
        finish = GOES_ON
        if token_id in sampling.stop_token_ids or (token_id in self._eos_token_ids and not sampling.ignore_eos):
            finish = STOP
        elif index + 1 >= sampling.max_tokens or work.prompt_tokens + index + 1 >= self._max_context_tokens:
            finish = LENGTH
        dispatch = work.dispatch
        self._rows.append((dispatch.request_key, dispatch.attempt, choice, index, token_id, finish))
        self._logprobs.append(logprobs)
        return finish == GOES_ON

    def message(self) -> StepTokens | None:
        """None if no token was drawn."""
        if not self._rows:
            return None
        keys, attempts, choices, indices, token_ids, finish = zip(*self._rows, strict=True)
        logprobs = tuple(self._logprobs) if any(row is not None for row in self._logprobs) else ()
        return StepTokens(self._step, keys, attempts, choices, indices, token_ids, finish, logprobs)
