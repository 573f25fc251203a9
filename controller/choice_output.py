"""Owns what one choice has brought so far: ids, text, logprobs, and how it ended. Pure; text is a fold over ids.

`pieces[i]` is the text that token i released, so that a reader can begin at any index and gets exactly what it lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from controller.lifecycle import Token
from controller.request import Delta, FinishReason, GenerationRequest, Logprobs
from tokenization.detokenizer import Detokenizer
from tokenization.stop_strings import StopMatcher


class Vocabulary(Protocol):
    """What `Tokenizer` gives."""

    @property
    def text_pieces(self) -> Sequence[bytes]: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...


class ChoiceOutput:
    __slots__ = (
        "_detokenizer",
        "_eos",
        "_matcher",
        "_request",
        "finish_reason",
        "last_token_s",
        "logprobs",
        "pieces",
        "stop_reason",
        "token_ids",
    )

    def __init__(self, request: GenerationRequest, vocabulary: Vocabulary) -> None:
        self._request = request
        self._eos = vocabulary.eos_token_ids
        self._detokenizer = Detokenizer(vocabulary, request.prompt_tail()) if request.needs_text else None
        self._matcher = StopMatcher(request.stop, include_stop=request.include_stop_text)
        self.token_ids: list[int] = []
        self.pieces: list[str] = []
        self.logprobs: list[Logprobs] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.last_token_s = 0.0

    def accept(self, token: Token) -> bool:
        """Appends the next token. True if it completed a stop string: then the choice is over."""
        self.token_ids.append(token.token_id)
        if token.logprobs is not None:
            self.logprobs.append(token.logprobs)
        if self._detokenizer is None:
            self.pieces.append("")
        elif self._shows(token):
            shown, stopped = self._text_of(token.token_id)
            self.pieces.append(shown)
            if stopped:
                return True
        else:
            self.pieces.append("")
        if token.finish is not None:
            self.end(token.finish, self._stop_id(token))
        return False

    def end(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """No token follows. What was held back is shown now, unless a stop string has cut it off."""
        if self.finish_reason is not None:
            return
        self.finish_reason, self.stop_reason = reason, stop_reason
        if self._detokenizer is None:
            return
        result = self._matcher.feed(self._detokenizer.flush())
        rest = result.text if result.stop is not None else result.text + self._matcher.flush()
        if rest and self.pieces:
            self.pieces[-1] += rest

    def delta(self, choice: int, start: int) -> Delta:
        """Everything from output index `start` on."""
        text = "".join(self.pieces[start:])
        return Delta(
            choice,
            start,
            tuple(self.token_ids[start:]),
            text if self._request.want_text else "",
            tuple(self.logprobs[start:]) if self.logprobs else (),
            self.finish_reason,
            self.stop_reason,
        )

    def _shows(self, token: Token) -> bool:
        """The token that stopped the engine is no text, unless it was asked for."""
        return token.finish != "stop" or self._request.include_stop_text

    def _text_of(self, token_id: int) -> tuple[str, bool]:
        assert self._detokenizer is not None
        text = self._detokenizer.feed((token_id,))
        if not text or len(self.token_ids) < self._request.sampling.min_tokens:
            return text, False
        result = self._matcher.feed(text)
        if result.stop is None:
            return result.text, False
        self.finish_reason, self.stop_reason = "stop", result.stop
        return result.text, True

    def _stop_id(self, token: Token) -> int | None:
        sampling = self._request.sampling
        if token.finish != "stop" or (token.token_id in self._eos and not sampling.ignore_eos):
            return None
        return token.token_id if token.token_id in sampling.stop_token_ids else None
