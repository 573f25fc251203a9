"""Owns the draw of the next token of each row: greedy, or Gumbel-max over counter-based noise.

Gumbel-max: the token with the highest logit / temperature + noise follows the softmax exactly (Gumbel, 1954; Maddison,
Tarlow and Minka, NIPS'14). With noise that depends on (seed, choice, output index, token id) only, a sequence resumed
anywhere draws what it would have drawn, and logits that differ by rounding rarely change it. Nothing is kept between calls.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from engine.candidates import Truncation
from engine.noise import stream_key
from engine.penalties import change_logits, changes_logits
from engine.protocol import LogprobRow, Sampling
from engine.race import PASS_ELEMENTS, Race
from pdserve.errors import InternalError

_BLOCK = 128  # logits among which the place of the highest is looked for


@dataclass(frozen=True, slots=True)
class Draw:
    """One row of logits. tokens: int32, prompt and output so far; a live object of the caller, only read."""

    sampling: Sampling
    choice: int
    tokens: array[int]
    prompt_tokens: int

    @property
    def output_index(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def key(self) -> int:
        return stream_key(self.sampling.seed, self.choice, self.output_index)

    @property
    def changes_logits(self) -> bool:
        return changes_logits(self.sampling, self.output_index)


@dataclass(frozen=True, slots=True)
class Drawn:
    """logprobs: as asked for by `Sampling.logprobs`; 0 asks for the drawn token alone."""

    token_id: int
    logprobs: LogprobRow | None


class BadLogits(InternalError):
    """Row `row` of the logits has NaN or +inf, or no token that may be drawn. Of the other rows nothing is said."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


class Sampler:
    """eos_token_ids: held back, with the request's own stop tokens, until min_tokens are out."""

    def __init__(self, vocab: int, eos_token_ids: Sequence[int], device: torch.device) -> None:
        self._vocab = vocab
        self._eos_token_ids = tuple(eos_token_ids)
        self._device = device

    def draw(self, logits: torch.Tensor, draws: Sequence[Draw]) -> list[Drawn]:
        """logits: [len(draws), vocab], float32; not modified. Of equally good tokens the lowest id is drawn.

        Raises BadLogits.
        """
        assert logits.shape == (len(draws), self._vocab)
        if not draws:
            return []
        peaks, token_ids = _best(logits)
        _check(peaks, range(len(draws)))
        slow = [row for row, draw in enumerate(draws) if draw.changes_logits or draw.sampling.temperature > 0]
        if slow:
            where = self._tensor(slow)
            part = logits if len(slow) == len(draws) else logits[where]
            token_ids[where] = self._draw_slow(part, [draws[row] for row in slow], slow)
        rows = self._logprobs(logits, token_ids, draws)
        return [Drawn(*pair) for pair in zip(token_ids.tolist(), rows, strict=True)]

    def _draw_slow(self, logits: torch.Tensor, draws: Sequence[Draw], rows: Sequence[int]) -> torch.Tensor:
        """Token ids [n]. `rows` names the draws in errors."""
        changed = [row for row, draw in enumerate(draws) if draw.changes_logits]
        if changed:
            logits = logits.clone()
            for row in changed:
                draw = draws[row]
                change_logits(logits[row], draw.sampling, draw.tokens, draw.prompt_tokens, self._eos_token_ids)
        peak = logits.amax(1)
        _check(peak, rows)
        random = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
        if len(random) == len(draws):
            return self._draw_random(logits, peak, draws)
        token_ids = logits.argmax(1)
        if random:
            where = self._tensor(random)
            token_ids[where] = self._draw_random(logits[where], peak[where], [draws[row] for row in random])
        return token_ids

    def _draw_random(self, logits: torch.Tensor, peak: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
        keys = self._tensor([draw.key for draw in draws]).unsqueeze(1)
        truncation = Truncation.of(peak, [draw.sampling for draw in draws], self._vocab)
        return Race(logits, truncation, keys).winners()

    def _logprobs(
        self, logits: torch.Tensor, token_ids: torch.Tensor, draws: Sequence[Draw]
    ) -> list[LogprobRow | None]:
        rows: list[LogprobRow | None] = [None] * len(draws)
        asked: dict[int, list[int]] = {}
        for row, draw in enumerate(draws):
            if draw.sampling.logprobs is not None:
                asked.setdefault(draw.sampling.logprobs, []).append(row)
        for top, group in asked.items():
            where = self._tensor(group)
            for row, logprobs in zip(group, logprob_rows(logits[where], token_ids[where], top), strict=True):
                rows[row] = logprobs
        return rows

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest logit of each row [n], NaN where it holds NaN, and the lowest id that has it, int64 [n].

    On the CPU torch finds a place four times as slowly as a value, so places are looked for in one block of each row only.
    """
    vocab = logits.shape[1]
    blocks, rest = divmod(vocab, _BLOCK)
    highest = logits[:, : blocks * _BLOCK].view(len(logits), blocks, _BLOCK).amax(2)
    if rest:
        highest = torch.cat([highest, logits[:, -rest:].amax(1, keepdim=True)], 1)
    first = highest.argmax(1, keepdim=True) * _BLOCK
    ids = (first + torch.arange(_BLOCK, device=logits.device)).clamp_(
        max=vocab - 1
    )  # the last one again: never the first
    return highest.amax(1), (first + logits.gather(1, ids).argmax(1, keepdim=True)).squeeze(1)


def logprob_rows(logits: torch.Tensor, token_ids: torch.Tensor, top: int) -> list[LogprobRow]:
    """logits: [n, vocab]; token_ids: int64 [n]. Per row: its token, then the `top` most likely ones (all, if there are fewer).

    Raises BadLogits.
    """
    rows: list[LogprobRow] = []
    step = max(1, PASS_ELEMENTS[logits.device.type] // logits.shape[1])
    for start in range(0, len(logits), step):
        rows += _logprob_rows(logits[start : start + step], token_ids[start : start + step], top, start)
    return rows


def _logprob_rows(logits: torch.Tensor, token_ids: torch.Tensor, top: int, first: int) -> Iterator[LogprobRow]:
    logprobs = torch.log_softmax(logits, dim=1, dtype=torch.float32)
    best, best_ids = torch.topk(logprobs, min(top, logits.shape[1]), dim=1)
    ids = torch.cat((token_ids.unsqueeze(1), best_ids), dim=1)
    values = torch.cat((logprobs.gather(1, token_ids.unsqueeze(1)), best), dim=1)
    _check(logits.amax(1), range(first, first + len(logits)))
    return (LogprobRow(tuple(i), tuple(v)) for i, v in zip(ids.tolist(), values.tolist(), strict=True))


def _check(peaks: torch.Tensor, rows: Sequence[int]) -> None:
    """`peaks`: the highest logit of each row, NaN where it holds NaN."""
    for row, peak in zip(rows, peaks.tolist(), strict=True):
        if not math.isfinite(peak):
            what = "no token that may be drawn" if peak == -math.inf else f"a logit that is {peak}"
            raise BadLogits(row, f"The logits of row {row} have {what}; the request cannot go on.")
