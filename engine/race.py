"""Owns the race of the tokens of each row: the highest logit / temperature + noise wins, of equal ones the lowest id.

It is run among the first few by rank. Where the others may be drawn too, the best so far bounds what they need: only tokens whose
random bits reach that are looked at, and nothing is sorted. Where all may be drawn, and they are few, all run at once: with the
device's own logarithm, which tells all but those that come in together with the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from engine.candidates import Candidates, Truncation, candidates_of
from engine.noise import MAX_NOISE, bits_for, gumbel, rough_gumbel, uniform_bits

PASS_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # of rows looked at whole: on a CPU they should stay in its caches
_DEPTH = 256  # tokens ranked at first; most distributions of a language model end before
_ALL_ELEMENTS = 1 << 16  # of rows that are run whole: with more, ranking them first costs no more
_TOGETHER = 1e-9  # far above what two logarithms of float64 differ by: scores that near the best are at most 26
_DEEPER = 8  # times as many at each further try, for a large top_k


@dataclass(frozen=True, slots=True)
class _Contenders:
    """Tokens beyond the candidates that may win, in flat columns. rows: of the race."""

    rows: torch.Tensor
    token_ids: torch.Tensor
    logits: torch.Tensor
    scores: torch.Tensor


@dataclass(frozen=True, slots=True)
class Race:
    """Rows that draw at random: logits [n, vocab], after penalties; keys [n, 1] of their noise, int64."""

    logits: torch.Tensor
    truncation: Truncation
    keys: torch.Tensor

    def winners(self) -> torch.Tensor:
        """Token ids, int64 [n]."""
        if self.logits.numel() <= _ALL_ELEMENTS and self.truncation.is_off(self.logits.shape[1]):
            return self._winners_of_all()
        token_ids = self.logits.new_empty(len(self.logits), dtype=torch.int64)
        waiting = torch.arange(len(token_ids), device=token_ids.device)
        race, depth = self, _DEPTH
        while len(waiting):
            decided, token_ids[waiting] = race._run(depth)
            undecided = (~decided).nonzero().squeeze(1)
            waiting, race, depth = waiting[undecided], race._rows(undecided), depth * _DEEPER
        return token_ids

    def _winners_of_all(self) -> torch.Tensor:
        """The same where nothing is truncated."""
        vocab = self.logits.shape[1]
        bits = uniform_bits(self.keys, torch.arange(vocab, device=self.logits.device))
        scaled = self.truncation.scaled(self.logits)
        rough = scaled + rough_gumbel(bits)
        rows, token_ids = (rough >= rough.amax(1, keepdim=True) - _TOGETHER).nonzero().unbind(1)
        if len(token_ids) == len(self.logits):
            return token_ids
        scores = scaled[rows, token_ids] + gumbel(bits[rows, token_ids])
        best = scores.new_full((len(self.logits),), -math.inf).scatter_reduce(0, rows, scores, "amax")
        lowest = token_ids.new_full((len(self.logits),), vocab)
        return lowest.scatter_reduce(0, rows, token_ids.masked_fill(scores < best[rows], vocab), "amin")

    def _rows(self, rows: torch.Tensor) -> Race:
        return Race(self.logits[rows], self.truncation.rows(rows), self.keys[rows])

    def _run(self, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether `depth` was enough for a row, and its token if so."""
        candidates = candidates_of(self.logits, self.truncation, depth)
        scores = candidates.scaled + gumbel(uniform_bits(self.keys, candidates.token_ids))
        scores.masked_fill_(~candidates.kept, -math.inf)
        best = scores.amax(1, keepdim=True)
        others = (scores < best) | ~candidates.kept
        winners = candidates.token_ids.masked_fill(others, self.logits.shape[1]).amin(1)
        for rows in self._contested(candidates, best):
            race, floor, score = self._rows(rows), candidates.floor[rows], best[rows]
            contenders = race._contenders(floor, score)
            winners[rows] = race._decided(contenders, candidates.goal[rows], score.squeeze(1), winners[rows])
        return candidates.settled | candidates.open, winners

    def _contested(self, candidates: Candidates, best: torch.Tensor) -> Iterator[torch.Tensor]:
        """Open rows where the highest noise could carry a token at the floor past the best, in parts of bounded size."""
        reach = self.truncation.scaled(candidates.floor) + MAX_NOISE
        rows = (candidates.open & (reach >= best).squeeze(1)).nonzero().squeeze(1)
        if len(rows):
            yield from torch.split(rows, max(1, PASS_ELEMENTS[rows.device.type] // self.logits.shape[1]))

    def _contenders(self, floor: torch.Tensor, best: torch.Tensor) -> _Contenders:
        """Tokens at or below the floor whose noise may carry them to `best`. Their bits tell which need a logarithm."""
        needed = bits_for(best - self.truncation.scaled(floor))
        bits = uniform_bits(self.keys, torch.arange(self.logits.shape[1], device=self.logits.device))
        rows, token_ids = ((bits >= needed) & (self.logits <= floor)).nonzero().unbind(1)
        logits = self.logits[rows, token_ids]
        truncation = self.truncation.rows(rows)
        scaled = truncation.scaled(logits.unsqueeze(1))
        scores = scaled + gumbel(bits[rows, token_ids].unsqueeze(1))
        scores.masked_fill_(scaled < truncation.log_min_p, -math.inf)
        return _Contenders(rows, token_ids, logits, scores.squeeze(1))

    def _decided(
        self, contenders: _Contenders, goal: torch.Tensor, best: torch.Tensor, winners: torch.Tensor
    ) -> torch.Tensor:
        """The winners when the contenders run too. One that leads, but lies outside the nucleus, takes all ranked after it along."""
        none = self.logits.shape[1]
        rows, token_ids, scores = contenders.rows, contenders.token_ids, contenders.scores
        while True:
            highest = best.scatter_reduce(0, rows, scores, "amax")
            leaders = winners.masked_fill(highest > best, none)
            leaders = leaders.scatter_reduce(0, rows, token_ids.masked_fill(scores < highest[rows], none), "amin")
            outside = (leaders != winners) & (goal < math.inf).squeeze(1)
            some = outside.nonzero().squeeze(1)
            outside[some] = self._rows(some)._mass_before(leaders[some].unsqueeze(1)) >= goal[some].squeeze(1)
            if not outside.any():
                return leaders
            bar = self.logits.gather(1, leaders.unsqueeze(1)).squeeze(1)[rows]
            after = (contenders.logits < bar) | ((contenders.logits == bar) & (token_ids >= leaders[rows]))
            scores = scores.masked_fill(outside[rows] & after, -math.inf)

    def _mass_before(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Mass, against the peak's 1, of the tokens ranked before `token_ids` [n, 1] that pass min_p. [n]"""
        bar = self.logits.gather(1, token_ids)
        ids = torch.arange(self.logits.shape[1], device=token_ids.device)
        before = (self.logits > bar) | ((self.logits == bar) & (ids < token_ids))
        scaled = self.truncation.scaled(self.logits)
        scaled.masked_fill_(~before | (scaled < self.truncation.log_min_p), -math.inf)
        return scaled.exp_().sum(1)
