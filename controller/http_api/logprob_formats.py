"""Owns how log-probabilities are written: OpenAI's legacy format (completions) and its chat format. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from controller.request import Logprobs
from tokenization.detokenizer import Detokenizer
from tokenization.tokenizer import Tokenizer

FLOOR = -9999.0  # JSON has no -inf; the value that peers write


class LogprobFormat(Protocol):
    """Positions of one choice are given in order; a position is None where nothing was predicted (the first token of a prompt)."""

    def render(self, choice: int, token_ids: Sequence[int], positions: Sequence[Logprobs | None]) -> object: ...


@dataclass(frozen=True, slots=True)
class TokenNames:
    """How a token is called."""

    tokenizer: Tokenizer
    as_ids: bool = False

    def of(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.as_ids else self.tokenizer.token_text(token_id)


@dataclass(slots=True)
class _Offset:
    detokenizer: Detokenizer
    chars: int = 0


@dataclass(slots=True)
class LegacyLogprobs:
    """`text_offset` is exact: token i completes text[offset[i]:offset[i+1]], also where several tokens make one character."""

    names: TokenNames
    prompt_tails: Sequence[Sequence[int]]  # by choice; empty where the prompt is echoed
    _offsets: dict[int, _Offset] = field(default_factory=dict)

    def render(self, choice: int, token_ids: Sequence[int], positions: Sequence[Logprobs | None]) -> object:
        if choice not in self._offsets:
            self._offsets[choice] = _Offset(Detokenizer(self.names.tokenizer, self.prompt_tails[choice]))
        place = self._offsets[choice]
        offsets: list[int] = []
        for token in token_ids:
            offsets.append(place.chars)
            place.chars += len(place.detokenizer.feed((token,)))
        return {
            "tokens": [self.names.of(token) for token in token_ids],
            "token_logprobs": [_drawn(position) for position in positions],
            "top_logprobs": [self._alternatives(position) for position in positions],
            "text_offset": offsets,
        }

    def _alternatives(self, position: Logprobs | None) -> dict[str, float] | None:
        if position is None or not position.logprobs:
            return None
        pairs = list(zip(position.token_ids, position.logprobs, strict=True))
        named: dict[str, float] = {}
        for token, logprob in [*pairs[1:], pairs[0]]:
            named.setdefault(self.names.of(token), max(logprob, FLOOR))
        return named


@dataclass(frozen=True, slots=True)
class ChatLogprobs:
    names: TokenNames
    top_logprobs: int

    def render(self, choice: int, token_ids: Sequence[int], positions: Sequence[Logprobs | None]) -> object:
        entries = [self._entry(position) for position in positions if position is not None]
        return {"content": entries, "refusal": None}

    def _entry(self, position: Logprobs) -> dict[str, object]:
        (drawn, *others), (logprob, *other_logprobs) = position.token_ids, position.logprobs
        top = list(zip(others, other_logprobs, strict=True))[: self.top_logprobs]
        return {**self._token(drawn, logprob), "top_logprobs": [self._token(*pair) for pair in top]}

    def _token(self, token: int, logprob: float) -> dict[str, object]:
        raw = list(self.names.tokenizer.token_bytes(token))
        return {"token": self.names.of(token), "logprob": max(logprob, FLOOR), "bytes": raw}


def _drawn(position: Logprobs | None) -> float | None:
    return max(position.logprobs[0], FLOOR) if position is not None and position.logprobs else None


def prompt_positions(prompt_tokens: int, given: Sequence[Logprobs]) -> list[Logprobs | None]:
    """One per prompt token: the first ones, that nothing predicts, are None."""
    known: list[Logprobs | None] = [position if position.logprobs else None for position in given[-prompt_tokens:]]
    return [None] * (prompt_tokens - len(known)) + known
