"""Owns what `verify` sends: built-in texts, prompts of random lengths, ways to sample. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from pdserve.client import Sampling

TEXTS = (
    "import os\n\n\ndef walk(top):\n",
    "class Reader:\n    def __init__(self, path):\n",
    "What does json.loads do?",
    "The with statement is used to wrap the execution of a block",
    "for line in sys.stdin:\n    key, _, value = line.partition(",
    "Die Würde des Menschen ist unantastbar. 人人生而自由 🎈",
    "try:\n    value = int(text)\nexcept ValueError as error:\n",
    "0123456789 " * 40,
)
# Around the block and hash unit of 16 tokens, and where chunks of a prefill begin (512).
EDGES = (1, 15, 16, 17, 32, 511, 513)
RANDOM_LENGTHS = 5
LONGEST_TOKENS = 2000


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to sample."""

    name: str
    n: int
    temperature: float

    def sampling(self, max_tokens: int) -> Sampling:
        # ignore_eos: a request that ends with its first token hands nothing over.
        return Sampling(max_tokens, self.temperature, seed=20261121, ignore_eos=True, logprobs=2)


MODES = (
    Mode("greedy", 1, 0.0),
    Mode("greedy n=3", 3, 0.0),
    Mode("seeded", 1, 0.9),
    Mode("seeded n=3", 3, 0.9),
)


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    prompt: tuple[int, ...]
    mode: Mode


def cases(texts: Sequence[Sequence[int]], limit_tokens: int, rng: Random) -> list[Case]:
    """texts: TEXTS as token ids. limit_tokens: of a prompt. Random prompts are drawn from the texts' own tokens."""
    known = sorted({token for text in texts for token in text})
    longest = min(LONGEST_TOKENS, limit_tokens)
    lengths = [length for length in EDGES if length <= longest]
    lengths += [rng.randint(1, longest) for _ in range(RANDOM_LENGTHS)] + [longest]
    prompts = [(f"text {number}", tuple(text[:longest])) for number, text in enumerate(texts)]
    prompts += [(f"{length} tokens", tuple(rng.choices(known, k=length))) for length in lengths]
    return [Case(name, prompt, mode) for mode in MODES for name, prompt in prompts]
