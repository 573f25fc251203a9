"""Owns OpenVINO GenAI inside its own environment, step by step: a child as `benchmarks/peer_child.py` describes it.

Load: {"model_dir" of a Hugging Face checkpoint, "work_dir" for what optimum-intel makes of it, "dtype", "threads"}. Nothing is
quantised: weights, KV cache and products have the type that is asked for. Without bf16 units OpenVINO multiplies in float32 alone, and
refuses a bf16 cache beside it: bfloat16 then is float32 there too, and the settings say so.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Protocol, cast

from benchmarks.peer_child import Json, Loaded, serve

BATCH_TOKENS = 2048  # as ours; its default of 256 makes prefill slower
CACHE_GIB = 2
LONGEST_OUTPUT = 4096  # tokens; longer than any case decodes


class Output(Protocol):
    @property
    def generated_ids(self) -> Sequence[int]: ...


class Handle(Protocol):
    """What is used of openvino_genai.GenerationHandle."""

    def can_read(self) -> bool: ...

    def read(self) -> Mapping[int, Output]: ...

    def cancel(self) -> None: ...


class Pipeline(Protocol):
    """What is used of openvino_genai.ContinuousBatchingPipeline."""

    def add_request(self, request_id: int, prompt: object, config: object) -> Handle: ...

    def step(self) -> None: ...

    def has_non_finished_requests(self) -> bool: ...


class OpenVinoEngine:
    """A PeerEngine."""

    def __init__(self, library: ModuleType, tensor: Callable[[Sequence[int]], object], pipeline: Pipeline) -> None:
        self._library = library
        self._tensor = tensor
        self._pipeline = pipeline
        self._next_id = 0
        self._running: list[Handle] = []

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        self._running = [self._submit(prompt, LONGEST_OUTPUT) for prompt in prompts]
        waiting = self._running
        while waiting:
            self._pipeline.step()
            waiting = [handle for handle in waiting if not handle.can_read()]
        self._drop_read()

    def step_s(self) -> float:
        start_s = time.perf_counter()
        self._pipeline.step()
        elapsed_s = time.perf_counter() - start_s
        decoded = self._drop_read()
        if decoded != len(self._running):
            raise RuntimeError(f"a step decoded {decoded} of {len(self._running)} sequences")
        return elapsed_s

    def end(self) -> None:
        for handle in self._running:
            handle.cancel()
        self._running = []
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()

    def prefill_s(self, prompt: Sequence[int]) -> float:
        start_s = time.perf_counter()
        handle = self._submit(prompt, 1)
        while not handle.can_read():
            self._pipeline.step()
        elapsed_s = time.perf_counter() - start_s
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return elapsed_s

    def greedy_tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        handle = self._submit(prompt, count)
        token_ids: list[int] = []
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            while handle.can_read():
                token_ids += [token for output in handle.read().values() for token in output.generated_ids]
        return token_ids

    def _submit(self, prompt: Sequence[int], max_tokens: int) -> Handle:
        self._next_id += 1
        config = self._library.GenerationConfig(max_new_tokens=max_tokens, ignore_eos=True)
        return self._pipeline.add_request(self._next_id, self._tensor(prompt), config)

    def _drop_read(self) -> int:
        """How many of the running ones had a token to read."""
        count = 0
        for handle in self._running:
            count += handle.can_read()
            while handle.can_read():
                handle.read()
        return count


def load(request: Json) -> Loaded:
    _export(cast(str, request["model_dir"]), cast(str, request["work_dir"]))
    library = importlib.import_module("openvino_genai")  # by name: it is not installed where this file is type-checked
    openvino, numpy = importlib.import_module("openvino"), importlib.import_module("numpy")
    scheduler = library.SchedulerConfig()
    scheduler.max_num_batched_tokens = BATCH_TOKENS
    scheduler.cache_size = CACHE_GIB
    scheduler.enable_prefix_caching = False
    has_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision = "bf16" if has_bf16 and request["dtype"] == "bfloat16" else "f32"
    properties = {
        "INFERENCE_NUM_THREADS": request["threads"],
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "ENABLE_CPU_PINNING": True,
    }
    pipeline = library.ContinuousBatchingPipeline(request["work_dir"], scheduler, "CPU", properties)

    def tensor(tokens: Sequence[int]) -> object:
        return openvino.Tensor(numpy.array([tokens], dtype=numpy.int64))

    settings: dict[str, str | int | float | bool] = {"token_budget": BATCH_TOKENS, "computes": precision}
    return Loaded(OpenVinoEngine(library, tensor, pipeline), library.__version__, settings)


def _export(model_dir: str, work_dir: str) -> None:
    optimum = importlib.import_module("optimum.intel")
    model = optimum.OVModelForCausalLM.from_pretrained(
        model_dir, export=True, load_in_8bit=False, compile=False, use_cache=True
    )
    model.save_pretrained(work_dir)


if __name__ == "__main__":
    serve(load)
