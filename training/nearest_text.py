"""Owns the look-up of the training text that resembles a beginning most: what follows the longest run of equal tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

RUN_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)  # tokens
UNKNOWN = -100
FACTOR = 6_364_136_223_846_793_005  # of the rolling hash, modulo 2**64


@dataclass(frozen=True, slots=True)
class NearestText:
    """Per length of run: the hashes of the runs in the text, sorted, and the token that follows each most often."""

    runs: tuple[tuple[Tensor, Tensor], ...]

    def next_tokens(self, tokens: Tensor) -> Tensor:
        """Return, for each place of tokens (rows, length), what follows the longest run that ends there in the text.

        A token that is not in the text has `UNKNOWN` behind it.
        """
        found = torch.full_like(tokens, UNKNOWN)
        for length, (hashes, followers) in zip(RUN_LENGTHS, self.runs, strict=False):
            if length > tokens.shape[1]:
                break
            wanted = run_hashes(tokens, length)
            places = torch.searchsorted(hashes, wanted).clamp(max=len(hashes) - 1)
            known, ends = hashes[places] == wanted, found[:, length - 1 :]
            ends.copy_(torch.where(known, followers[places], ends))
        return found


def run_hashes(tokens: Tensor, length: int) -> Tensor:
    """Return the hash of every run of `length` tokens along the last dimension."""
    count = tokens.shape[-1] - length + 1
    hashes = torch.zeros_like(tokens[..., :count])
    for offset in range(length):
        hashes = hashes * FACTOR + tokens[..., offset : offset + count] + 1
    return hashes


def nearest_text(text: Tensor) -> NearestText:
    """Index a text of int64 tokens (one dimension)."""
    return NearestText(tuple(_followers(text, length) for length in RUN_LENGTHS if length < len(text)))


def _followers(text: Tensor, length: int) -> tuple[Tensor, Tensor]:
    hashes, following = run_hashes(text[:-1], length), text[length:]
    by_token = following.argsort(stable=True)
    order = by_token[hashes[by_token].argsort(stable=True)]
    hashes, following = hashes[order], following[order]
    _, counts = torch.unique_consecutive(hashes * FACTOR + following, return_counts=True)
    ends = counts.cumsum(0) - 1  # one per pair of a run and a token
    by_count = ends[counts.argsort(stable=True)]
    pairs = by_count[hashes[by_count].argsort(stable=True)]  # of equal runs, the pair that occurs most comes last
    last = torch.ones(len(pairs), dtype=torch.bool)
    last[:-1] = hashes[pairs][1:] != hashes[pairs][:-1]
    return hashes[pairs[last]], following[pairs[last]]
