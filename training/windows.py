"""The order of the training text: windows of tokens drawn from weighted sources, every window once per epoch of its length."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Source:
    """A stream of tokens (int32, one dimension) and the share of the training windows that comes from it."""

    tokens: Tensor
    share: float


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of training at one window length: `steps` batches of `rows` windows of `length` tokens."""

    steps: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.steps * self.rows * self.length


def batches(sources: tuple[Source, ...], stages: tuple[Stage, ...], seed: int) -> Iterator[Tensor]:
    """Yield every batch (rows, length + 1) int64 of the training; the same arguments give the same batches.

    A later stage of the same length goes on where the earlier one stopped in its epoch.
    """
    rng = random.Random(seed)
    shares = [source.share for source in sources]
    streams_of: dict[int, list[Iterator[Tensor]]] = {}
    for stage in stages:
        if stage.length not in streams_of:
            streams_of[stage.length] = [_windows(source.tokens, stage.length, rng) for source in sources]
        streams = streams_of[stage.length]
        for _ in range(stage.steps):
            yield torch.stack([next(rng.choices(streams, shares)[0]) for _ in range(stage.rows)])


def _windows(tokens: Tensor, length: int, rng: random.Random) -> Iterator[Tensor]:
    while True:
        phase = rng.randrange(min(length, len(tokens) - length))
        starts = list(range(phase, len(tokens) - length, length))
        rng.shuffle(starts)
        for start in starts:
            yield tokens[start : start + length + 1].long()
