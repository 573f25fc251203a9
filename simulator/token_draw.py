"""Owns the tokens and log-probabilities of a modelled engine: a pure function of prompt, seed, choice and output index.

A re-dispatch with prompt + accepted tokens therefore goes on with the tokens that the first attempt would have drawn. Greedy
work depends on neither seed nor choice, as with a real model.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import xxhash

from engine.protocol import LogprobRow, Work

_REDRAWS = 64
_UNIT = 2.0**-64


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token ids [first_id, size) are drawn uniformly; an EOS id with probability `eos_rate` at each position."""

    size: int = 32_000
    first_id: int = 16
    eos_token_ids: tuple[int, ...] = (2,)
    eos_rate: float = 0.0


def stream_key(work: Work, choice: int) -> bytes:
    """What makes the tokens of one choice: the prompt and, unless greedy, seed and choice. 24 bytes."""
    prompt = xxhash.xxh3_64_digest(memoryview(work.token_ids)[: work.prompt_tokens * 4])
    if work.sampling.temperature == 0:
        return prompt + bytes(16)
    return prompt + (work.sampling.seed & (2**64 - 1)).to_bytes(8, "little") + choice.to_bytes(8, "little")


def draw_token(vocabulary: Vocabulary, key: bytes, index: int, banned: Container[int] = ()) -> int:
    """Token at output index `index` of the stream `key`, never one of `banned`."""
    for redraw in range(_REDRAWS):
        word = xxhash.xxh3_64_intdigest(key + index.to_bytes(4, "little"), seed=redraw)
        token_id = _token_of(vocabulary, word)
        if token_id not in banned:
            return token_id
    return next(t for t in range(vocabulary.first_id, vocabulary.size) if t not in banned)


def _token_of(vocabulary: Vocabulary, word: int) -> int:
    eos = vocabulary.eos_token_ids
    if eos and word * _UNIT < vocabulary.eos_rate:
        return eos[word % len(eos)]
    token_id = vocabulary.first_id + (word & 0xFFFFFFFF) % (vocabulary.size - vocabulary.first_id)
    # An EOS id among the ordinary ones would end streams at a rate nobody asked for.
    return token_id if token_id not in eos else vocabulary.first_id


def logprob_row(vocabulary: Vocabulary, key: bytes, index: int, token_id: int, alternatives: int) -> LogprobRow:
    """A made-up but deterministic row: the drawn token is the most likely one, each alternative half as likely as the last."""
    ids = [token_id]
    for rank in range(1, alternatives):
        ids.append(draw_token(vocabulary, key + b"alternative" + rank.to_bytes(2, "little"), index, banned=ids))
    likely = [-0.6931471805599453 * (rank + 1) for rank in range(len(ids))]
    if alternatives == 0:
        return LogprobRow((token_id,), (likely[0],))
    return LogprobRow((token_id, *ids), (likely[0], *likely))
