"""Owns a plain sampler to compare the real one with: the whole vocabulary, one row, numpy, nothing clever."""

from __future__ import annotations

from array import array
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from engine.protocol import Sampling

Floats = npt.NDArray[np.float64]
Words = TypeVar("Words", np.uint64, npt.NDArray[np.uint64])


def sampling(
    temperature: float = 1.0,
    *,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
    bias: dict[int, float] | None = None,
    seed: int = 7,
    min_tokens: int = 0,
    stop: tuple[int, ...] = (),
    logprobs: int | None = None,
) -> Sampling:
    return Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias or {},
        seed=seed,
        max_tokens=1000,
        min_tokens=min_tokens,
        ignore_eos=False,
        stop_token_ids=stop,
        logprobs=logprobs,
    )


def reference_noise(seed: int, choice: int, output_index: int, vocab: int) -> Floats:
    with np.errstate(over="ignore"):
        golden = np.uint64(0x9E3779B97F4A7C15)
        key = _mix(np.uint64(seed % 2**64) + golden)
        key = _mix(key + np.uint64(choice) * golden + golden)
        key = _mix(key + np.uint64(output_index) * golden + golden)
        words = _mix(key + np.arange(1, vocab + 1, dtype=np.uint64) * golden)
    uniform = ((words >> np.uint64(32)).astype(np.float64) + 0.5) / 2**32
    noise: Floats = -np.log(-np.log(uniform))
    return noise


def _mix(word: Words) -> Words:
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def changed_logits(
    row: npt.NDArray[np.float32], asked: Sampling, tokens: array[int], prompt_tokens: int, eos: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    logits = row.copy()
    output = list(tokens[prompt_tokens:])
    for token_id in range(len(logits)):
        if len(output) < asked.min_tokens and token_id in (*eos, *asked.stop_token_ids):
            logits[token_id] = -np.inf
        logits[token_id] += np.float32(asked.logit_bias.get(token_id, 0.0))
        if asked.repetition_penalty != 1 and token_id in tokens:
            factor = np.float32(asked.repetition_penalty)
            logits[token_id] = logits[token_id] / factor if logits[token_id] > 0 else logits[token_id] * factor
        count = output.count(token_id)
        if count:
            logits[token_id] -= np.float32(count) * np.float32(asked.frequency_penalty)
            logits[token_id] -= np.float32(asked.presence_penalty)
    return logits


def acceptable(logits: npt.NDArray[np.float32], asked: Sampling, noise: Floats) -> set[int]:
    """The tokens that a correct draw may give: one, or more where rounding may tip the balance."""
    order = np.lexsort((np.arange(len(logits)), -logits))
    if asked.temperature == 0:
        return {int(order[0])}
    scaled = (logits[order].astype(np.float64) - float(logits.max())) / asked.temperature
    kept = np.isfinite(scaled)
    if asked.min_p > 0:
        kept &= scaled >= np.log(asked.min_p)
    if asked.top_k > 0:
        kept &= np.arange(len(scaled)) < asked.top_k
    mass = np.where(kept, np.exp(scaled), 0.0)
    before = np.concatenate(([0.0], np.cumsum(mass)[:-1]))
    chosen = set()
    for slack in (-1e-11, 1e-11):
        nucleus = kept & (before < asked.top_p * mass.sum() * (1 + slack)) if asked.top_p < 1 else kept
        scores = np.where(nucleus, scaled + noise[order], -np.inf)
        chosen |= {int(token_id) for token_id in order[scores >= scores.max() - 1e-11]}
    return chosen
