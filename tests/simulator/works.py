"""Owns the work and engines that the simulator's tests build."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from engine.protocol import Dispatch, Event, Layout, Sampling, StepTokens, Work
from kv_transfer.keys import chain_hashes
from simulator.modelled_engine import ModelledConfig, ModelledEngine

ROOT = b"r" * 32
SAMPLING = Sampling(
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    logit_bias={},
    seed=7,
    max_tokens=20,
    min_tokens=0,
    ignore_eos=False,
    stop_token_ids=(),
)
E = TypeVar("E", bound=Event)


def work(
    prompt: Sequence[int],
    *,
    key: int = 1,
    attempt: int = 1,
    accepted: Sequence[int] = (),
    choices: tuple[int, ...] = (0,),
    sampling: Sampling = SAMPLING,
) -> Work:
    token_ids = array("i", [*prompt, *accepted]).tobytes()
    hashes = chain_hashes(ROOT, token_ids)
    return Work(Dispatch(key, attempt), f"r{key}", choices, token_ids, len(prompt), sampling, hashes)


def with_max_tokens(max_tokens: int) -> Sampling:
    return msgspec.structs.replace(SAMPLING, max_tokens=max_tokens)


def layout(blocks: int, layers: int = 2, page_tokens: int = 16) -> Layout:
    return Layout(layers, blocks, page_tokens, 1, 4, "float32", 2 * page_tokens * 4 * 4)


class Recorder:
    """An EventSink that keeps everything."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def flush(self) -> None:
        pass

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    def tokens(self, key: int = 1, choice: int = 0) -> list[int]:
        """Output of one choice over all attempts, in order of arrival."""
        return [row[4] for row in self.rows(key) if row[2] == choice]

    def rows(self, key: int = 1) -> list[tuple[int, int, int, int, int, int]]:
        """(request key, attempt, choice, output index, token id, finish)"""
        return [row for step in self.of(StepTokens) for row in _rows(step) if row[0] == key]


def _rows(step: StepTokens) -> list[tuple[int, int, int, int, int, int]]:
    return list(
        zip(
            step.request_keys,
            step.attempts,
            step.choices,
            step.indices,
            step.token_ids,
            step.finish,
            strict=True,
        )
    )


class Bench:
    """An engine, what it said, and a clock that only its steps move."""

    def __init__(self, config: ModelledConfig | None = None) -> None:
        self.now_s = 100.0
        self.sink = Recorder()
        self.engine = ModelledEngine(config or ModelledConfig(), self.sink, pause=self._spend, clock=lambda: self.now_s)

    def _spend(self, seconds: float) -> None:
        self.now_s += seconds

    def run(self, limit: int = 10_000) -> None:
        """Steps until there is nothing to do."""
        for _ in range(limit):
            if not self.engine.step():
                return
        raise AssertionError("the engine is still busy")
