"""Owns vLLM inside its own environment: a child as `benchmarks/peer_child.py` describes it.

Load: {"model_dir", "dtype", "max_tokens", "max_sequences", "eager"}.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from typing import Protocol, cast

from benchmarks.peer_child import Json, Loaded, serve

LONGEST_OUTPUT = 4096  # tokens; longer than any case decodes


class Completion(Protocol):
    token_ids: Sequence[int]


class Output(Protocol):
    request_id: str
    outputs: Sequence[Completion]


class Engine(Protocol):
    """What is used of vllm.LLMEngine."""

    def add_request(self, request_id: str, prompt: object, params: object) -> object: ...

    def step(self) -> Sequence[Output]: ...

    def abort_request(self, request_ids: list[str]) -> None: ...

    def has_unfinished_requests(self) -> bool: ...


class VllmEngine:
    """A PeerEngine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._next_id = 0
        self._running: list[str] = []

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        self._running = [self._submit(prompt, LONGEST_OUTPUT) for prompt in prompts]
        waiting = set(self._running)
        while waiting:
            waiting -= {output.request_id for output in self._engine.step() if output.outputs[0].token_ids}

    def step_s(self) -> float:
        start_s = time.perf_counter()
        outputs = self._engine.step()
        elapsed_s = time.perf_counter() - start_s
        if len(outputs) != len(self._running):
            raise RuntimeError(f"a step decoded {len(outputs)} of {len(self._running)} sequences")
        return elapsed_s

    def end(self) -> None:
        self._engine.abort_request(self._running)
        self._running = []
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def prefill_s(self, prompt: Sequence[int]) -> float:
        start_s = time.perf_counter()
        self._submit(prompt, 1)
        while not self._engine.step():
            pass
        return time.perf_counter() - start_s

    def greedy_tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        self._submit(prompt, count)
        token_ids: list[int] = []
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                token_ids = list(output.outputs[0].token_ids)
        return token_ids

    def _submit(self, prompt: Sequence[int], max_tokens: int) -> str:
        self._next_id += 1
        name = str(self._next_id)
        params = importlib.import_module("vllm").SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        return name


def load(request: Json) -> Loaded:
    vllm = importlib.import_module("vllm")  # by name: nothing of it is installed where this file is type-checked
    llm = vllm.LLM(
        model=request["model_dir"],
        dtype=request["dtype"],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=request["max_tokens"],
        max_num_seqs=request["max_sequences"],
        enforce_eager=request["eager"],
        disable_log_stats=True,
    )
    config = llm.llm_engine.vllm_config
    settings = {
        "token_budget": config.scheduler_config.max_num_batched_tokens,
        "block_tokens": config.cache_config.block_size,
        "compiled": not request["eager"],
    }
    return Loaded(VllmEngine(cast(Engine, llm.llm_engine)), vllm.__version__, settings)


if __name__ == "__main__":
    serve(load)
