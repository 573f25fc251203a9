"""Owns what the children of all peers have in common: one JSON request per line on stdin, one JSON answer per line on stdout.

Runs with the python of the peer's own environment; imports nothing but the standard library. What the peer prints goes to stderr.

Requests: {"op": "load", …} -> {"version", "settings"}; {"op": "begin", "prompts"} prefills them all -> {}; {"op": "steps", "count"} ->
{"seconds": [...]}, one entry per decode step; {"op": "end"} drops the running ones -> {}; {"op": "prefill", "prompt"} -> {"seconds":
[from submission to the first token]}; {"op": "tokens", "prompt", "count"} -> {"token_ids"}, greedily. A failure: {"error"}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TextIO, cast

Json = Mapping[str, object]


class PeerEngine(Protocol):
    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Returns when every prompt has its first token: from then on a step decodes one token of each."""

    def step_s(self) -> float:
        """Seconds of one decode step."""
        ...

    def end(self) -> None: ...

    def prefill_s(self, prompt: Sequence[int]) -> float:
        """Seconds from submission to the first token."""
        ...

    def greedy_tokens(self, prompt: Sequence[int], count: int) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Loaded:
    engine: PeerEngine
    version: str
    settings: Mapping[str, str | int | float | bool]


def serve(load: Callable[[Json], Loaded]) -> None:
    """Answers until the end of stdin. load: makes the engine from the first request."""
    answers = _own_stdout()
    desk = _Desk(load)
    for line in sys.stdin:
        try:
            answer = desk.answer(cast(Json, json.loads(line)))
        except Exception as error:  # the root of this process: the parent raises it
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


class _Desk:
    def __init__(self, load: Callable[[Json], Loaded]) -> None:
        self._load = load
        self._engine: PeerEngine | None = None

    def answer(self, request: Json) -> Json:
        match request["op"]:
            case "load":
                loaded = self._load(request)
                self._engine = loaded.engine
                return {"version": loaded.version, "settings": loaded.settings}
            case "begin":
                self.engine.begin(cast(list[list[int]], request["prompts"]))
                return {}
            case "steps":
                return {"seconds": [self.engine.step_s() for _ in range(cast(int, request["count"]))]}
            case "end":
                self.engine.end()
                return {}
            case "prefill":
                return {"seconds": [self.engine.prefill_s(cast(list[int], request["prompt"]))]}
            case "tokens":
                prompt, count = cast(list[int], request["prompt"]), cast(int, request["count"])
                return {"token_ids": self.engine.greedy_tokens(prompt, count)}
            case unknown:
                raise ValueError(f"unknown op: {unknown}")

    @property
    def engine(self) -> PeerEngine:
        if self._engine is None:
            raise RuntimeError("load comes first")
        return self._engine


def _own_stdout() -> TextIO:
    """The stdout we were given; fd 1 becomes stderr, so that no library can write between the answers."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers
