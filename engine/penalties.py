"""Owns what a request changes in its logits before the draw: bans, biases, penalties, in vLLM's order."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from engine.protocol import Sampling


def changes_logits(sampling: Sampling, output_index: int) -> bool:
    """Whether `change_logits` would change anything at this index, repetition of prompt tokens included."""
    return (
        output_index < sampling.min_tokens
        or bool(sampling.logit_bias)
        or sampling.repetition_penalty != 1
        or (output_index > 0 and (sampling.presence_penalty != 0 or sampling.frequency_penalty != 0))
    )


def change_logits(
    row: torch.Tensor, sampling: Sampling, tokens: array[int], prompt_tokens: int, eos_token_ids: Sequence[int]
) -> None:
    """Changes `row` ([vocab], float32) in place.

    Token ids outside the vocabulary name nothing that could be drawn, so bans and biases of them have no effect.
    """
    vocab = len(row)
    if len(tokens) - prompt_tokens < sampling.min_tokens:
        row[_known((*eos_token_ids, *sampling.stop_token_ids), vocab, row.device)] = -math.inf
    if sampling.logit_bias:
        ids = _known(sampling.logit_bias, vocab, row.device)
        row[ids] += row.new_tensor([sampling.logit_bias[token_id] for token_id in ids.tolist()])
    if sampling.repetition_penalty != 1:
        _penalize_repetition(row, np.array(tokens, dtype=np.int64), sampling.repetition_penalty)
    if sampling.frequency_penalty or sampling.presence_penalty:
        _penalize_output(row, np.array(tokens[prompt_tokens:], dtype=np.int64), sampling)


def _penalize_repetition(row: torch.Tensor, tokens: np.ndarray[tuple[int], np.dtype[np.int64]], penalty: float) -> None:
    """CTRL (arXiv 1909.05858, section 4.1), for negative logits as everybody does: towards less likely in both cases."""
    seen = np.zeros(len(row), dtype=np.bool_)
    seen[tokens] = True
    ids = torch.from_numpy(np.flatnonzero(seen)).to(row.device)
    logits = row[ids]
    row[ids] = torch.where(logits > 0, logits / penalty, logits * penalty)


def _penalize_output(row: torch.Tensor, output: np.ndarray[tuple[int], np.dtype[np.int64]], sampling: Sampling) -> None:
    """OpenAI's definition: count * frequency_penalty, and presence_penalty once."""
    counts = np.bincount(output, minlength=len(row))
    ids = np.flatnonzero(counts)
    times = torch.from_numpy(counts[ids]).to(row.device, row.dtype)
    where = torch.from_numpy(ids).to(row.device)
    row[where] = row[where] - times * sampling.frequency_penalty - sampling.presence_penalty


def _known(token_ids: Iterable[int], vocab: int, device: torch.device) -> torch.Tensor:
    known = sorted({token_id for token_id in token_ids if 0 <= token_id < vocab})
    return torch.tensor(known, dtype=torch.int64, device=device)
