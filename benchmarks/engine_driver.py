"""Owns how a benchmark drives a native engine in its own process: submit, step, read what came out."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from engine.cuda_streams import prompt_lane
from engine.flight import Lane
from engine.loaded_model import LoadedModel, load_model
from engine.native import NativeEngine
from engine.protocol import (
    Cancel,
    Dispatch,
    Event,
    LogprobRow,
    PromptLogprobs,
    Sampling,
    StepTokens,
    Submit,
    Work,
    WorkFailed,
)
from kv_transfer.keys import chain_hashes
from service_kit.config import EngineConfig, ModelConfig

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]
LaneOf = Callable[[LoadedModel, EngineConfig], Lane | None]


def greedy(max_tokens: int, logprobs: int | None = None) -> Sampling:
    return Sampling(0.0, 1.0, 0, 0.0, 1.0, 0.0, 0.0, {}, 1, max_tokens, 0, True, (), logprobs)


class TokenSink:
    """An EventSink that keeps tokens and log-probabilities, per dispatch."""

    def __init__(self) -> None:
        self.token_ids: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[LogprobRow]] = {}
        self.prompt_logprobs: dict[int, tuple[LogprobRow, ...]] = {}

    def emit(self, event: Event) -> None:
        if isinstance(event, WorkFailed):
            raise RuntimeError(f"{event.reason}: {event.message}")
        if isinstance(event, PromptLogprobs):
            self.prompt_logprobs[event.dispatch.request_key] = event.rows
        if not isinstance(event, StepTokens):
            return
        for column, key in enumerate(event.request_keys):
            self.token_ids.setdefault(key, []).append(event.token_ids[column])
            row = event.logprobs[column] if event.logprobs else None
            if row is not None:
                self.logprobs.setdefault(key, []).append(row)

    def flush(self) -> None:
        pass


class EngineDriver:
    """One native engine. Nothing is reused between prompts, so that every prefill is a whole one; where `share` is given,
    prefixes are, and attention over them is shared or not."""

    def __init__(
        self, model_dir: Path, device: Device, dtype: Dtype, *, threads: int, kv_bytes: int, share: bool | None = None
    ) -> None:
        self._open(
            ModelConfig(path=str(model_dir), device=device, dtype=dtype),
            EngineConfig(
                threads=threads,
                kv_bytes=kv_bytes,
                prefix_reuse=share is not None,
                shared_prefix_attention=share is not False,
            ),
        )

    @classmethod
    def configured(
        cls, model: ModelConfig, engine: EngineConfig, sink: TokenSink | None = None, lane_of: LaneOf = prompt_lane
    ) -> EngineDriver:
        driver = cls.__new__(cls)
        driver._open(model, engine, sink, lane_of)
        return driver

    def _open(
        self, model: ModelConfig, engine: EngineConfig, sink: TokenSink | None = None, lane_of: LaneOf = prompt_lane
    ) -> None:
        self.sink = TokenSink() if sink is None else sink
        loaded, memory = load_model(model, engine)
        self.engine = NativeEngine(loaded, memory, engine, self.sink, lane_of(loaded, engine))
        self._next_key = 0

    def submit(
        self, prompt: Sequence[int], sampling: Sampling, mode: Literal["generate", "prefill"] = "generate"
    ) -> int:
        """Returns the request key under which the sink keeps the tokens."""
        self._next_key += 1
        token_ids = array("i", prompt).tobytes()
        hashes = chain_hashes(bytes(32), token_ids)
        work = Work(Dispatch(self._next_key, 1), "benchmark", (0,), token_ids, len(prompt), sampling, hashes)
        self.engine.handle(Submit(work, mode))
        return self._next_key

    def finish(self) -> None:
        """Steps until nothing is left to do."""
        while self.engine.step():
            pass

    def prefill_s(self, prompt: Sequence[int]) -> float:
        """Seconds from submission to the first token."""
        start_s = time.perf_counter()
        key = self.submit(prompt, greedy(1))
        while key not in self.sink.token_ids:
            self.engine.step()
        elapsed_s = time.perf_counter() - start_s
        self.finish()
        return elapsed_s

    def prefill_beside(self, prompt: Sequence[int], decoding: int) -> list[float]:
        """Seconds between the tokens of `decoding`, from the submission of `prompt` to the first step after its first token."""
        key, gaps, last_s = self.submit(prompt, greedy(1)), list[float](), time.perf_counter()
        tokens = self.sink.token_ids[decoding]
        while key not in self.sink.token_ids:
            known = len(tokens)
            self.engine.step()
            if len(tokens) > known:
                now_s = time.perf_counter()
                gaps.append(now_s - last_s)
                last_s = now_s
        return gaps

    def begin_decode(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[int]:
        """Prefills all prompts; from then on each step decodes one token of each."""
        keys = [self.submit(prompt, greedy(max_tokens)) for prompt in prompts]
        while not all(key in self.sink.token_ids for key in keys):
            self.engine.step()
        return keys

    def step_s(self) -> float:
        start_s = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - start_s

    def cancel(self, keys: Sequence[int]) -> None:
        for key in keys:
            self.engine.handle(Cancel(Dispatch(key, 1)))
        self.finish()

    def close(self) -> None:
        self.engine.close()
