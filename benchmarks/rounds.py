"""Owns how engines are measured beside each other: the same prompts, in rounds in which each has its turn.

What disturbs the machine then disturbs all of them. A case ends early when its time is spent, but not before two rounds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.random_model import LLAMA_100M

Prompt = Sequence[int]

LEAST_ROUNDS = 2
DECODE_CONTEXT = 128  # tokens of each prompt when decoding begins


class DecodeContender(Protocol):
    """Decodes a batch. `begin` prefills the prompts, all of one length; each step draws one token of each until `end`."""

    @property
    def name(self) -> str: ...

    def begin(self, prompts: Sequence[Prompt]) -> None: ...

    def steps_s(self, count: int) -> list[float]:
        """Seconds of each of `count` steps."""
        ...

    def end(self) -> None: ...


class PrefillContender(Protocol):
    @property
    def name(self) -> str: ...

    def prefill_s(self, prompt: Prompt) -> float:
        """Seconds from submission to the first token, nothing reused."""
        ...


@dataclass(frozen=True, slots=True)
class Effort:
    decode_rounds: int
    decode_steps: int  # per round, where the slowest takes them in slice_s
    prefill_rounds: int
    slice_s: float  # of one contender in one decode round
    case_s: float  # of all contenders in one case


def random_prompt(source: random.Random, tokens: int) -> list[int]:
    return [source.randrange(10, LLAMA_100M.vocab) for _ in range(tokens)]


def decode_ms(contenders: Sequence[DecodeContender], batch: int, effort: Effort) -> list[list[float]]:
    """Milliseconds per step, one list per contender."""
    source = random.Random(batch)
    prompts = [random_prompt(source, DECODE_CONTEXT) for _ in range(batch)]
    samples: list[list[float]] = [[] for _ in contenders]
    for contender in contenders:
        contender.begin(prompts)
    # The first step of a batch shape pays for its buffers; the second says how many fit into a slice.
    slowest_s = max(contender.steps_s(2)[1] for contender in contenders)
    steps = max(1, min(effort.decode_steps, int(effort.slice_s / slowest_s)))
    start_s = time.monotonic()
    for turn in range(effort.decode_rounds):
        for taken, contender in zip(samples, contenders, strict=True):
            taken += [elapsed_s * 1e3 for elapsed_s in contender.steps_s(steps)]
        if turn + 1 >= LEAST_ROUNDS and time.monotonic() - start_s > effort.case_s:
            break
    for contender in contenders:
        contender.end()
    return samples


def prefill_rates(contenders: Sequence[PrefillContender], tokens: int, effort: Effort) -> list[list[float]]:
    """Tokens per second, one list per contender."""
    source = random.Random(tokens)
    for contender in contenders:
        contender.prefill_s(random_prompt(source, tokens))
    samples: list[list[float]] = [[] for _ in contenders]
    start_s = time.monotonic()
    for turn in range(effort.prefill_rounds):
        prompt = random_prompt(source, tokens)
        for taken, contender in zip(samples, contenders, strict=True):
            taken.append(tokens / contender.prefill_s(prompt))
        if turn + 1 >= LEAST_ROUNDS and time.monotonic() - start_s > effort.case_s:
            break
    return samples
