"""Owns vLLM inside its own environment: one JSON request per line on stdin, one JSON answer per line on stdout.

Run by path with the python of that environment; imports nothing of this repository. Everything that vLLM prints goes to stderr.

Requests: {"op": "load", "model_dir", "dtype", "max_tokens", "max_sequences", "eager"} -> {"version", "settings"};
{"op": "begin", "prompts"} prefills them all -> {}; {"op": "steps", "count"} -> {"seconds": [...]}, one entry per decode step;
{"op": "end"} drops the running ones -> {}; {"op": "prefill", "prompt"} -> {"seconds": [from submission to the first token]};
{"op": "tokens", "prompt", "count"} -> {"token_ids"}, greedily. A failure is answered with {"error"}.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Protocol, TextIO, cast

Json = Mapping[str, object]
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


class Child:
    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._next_id = 0
        self._running: list[str] = []

    def answer(self, request: Json) -> Json:
        match request["op"]:
            case "load":
                return self._load(request)
            case "begin":
                return self._begin(cast(list[list[int]], request["prompts"]))
            case "steps":
                return {"seconds": [self._timed_step() for _ in range(cast(int, request["count"]))]}
            case "end":
                return self._end()
            case "prefill":
                return self._prefill(cast(list[int], request["prompt"]))
            case "tokens":
                return self._tokens(cast(list[int], request["prompt"]), cast(int, request["count"]))
            case unknown:
                raise ValueError(f"unknown op: {unknown}")

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("load comes first")
        return self._engine

    def _load(self, request: Json) -> Json:
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
        self._engine = cast(Engine, llm.llm_engine)
        config = llm.llm_engine.vllm_config
        settings = {
            "token_budget": config.scheduler_config.max_num_batched_tokens,
            "block_tokens": config.cache_config.block_size,
            "compiled": not request["eager"],
        }
        return {"version": vllm.__version__, "settings": settings}

    def _submit(self, prompt: list[int], max_tokens: int) -> str:
        self._next_id += 1
        name = str(self._next_id)
        params = importlib.import_module("vllm").SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    def _begin(self, prompts: list[list[int]]) -> Json:
        """Returns when every prompt has its first token: from then on a step decodes one token of each."""
        self._running = [self._submit(prompt, LONGEST_OUTPUT) for prompt in prompts]
        waiting = set(self._running)
        while waiting:
            waiting -= {output.request_id for output in self.engine.step() if output.outputs[0].token_ids}
        return {}

    def _timed_step(self) -> float:
        start_s = time.perf_counter()
        outputs = self.engine.step()
        elapsed_s = time.perf_counter() - start_s
        if len(outputs) != len(self._running):
            raise RuntimeError(f"a step decoded {len(outputs)} of {len(self._running)} sequences")
        return elapsed_s

    def _end(self) -> Json:
        self.engine.abort_request(self._running)
        self._running = []
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return {}

    def _prefill(self, prompt: list[int]) -> Json:
        start_s = time.perf_counter()
        self._submit(prompt, 1)
        while not self.engine.step():
            pass
        return {"seconds": [time.perf_counter() - start_s]}

    def _tokens(self, prompt: list[int], count: int) -> Json:
        self._submit(prompt, count)
        token_ids: list[int] = []
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                token_ids = list(output.outputs[0].token_ids)
        return {"token_ids": token_ids}


def _own_stdout() -> TextIO:
    """The stdout we were given; fd 1 becomes stderr, so that no library can write between the answers."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def main() -> None:
    answers = _own_stdout()
    child = Child()
    for line in sys.stdin:
        try:
            answer = child.answer(cast(Json, json.loads(line)))
        except Exception as error:  # the root of this process: the parent raises it
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
