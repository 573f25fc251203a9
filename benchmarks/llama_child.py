"""Owns llama.cpp inside its own environment, by its batch interface: a child as `benchmarks/peer_child.py` describes it.

Load: {"model_path" of a GGUF file, "dtype", "threads", "max_tokens", "max_sequences"}. Every sequence has a cache stream of its own,
as llama.cpp's own batched benchmark has them; the cache has the weights' type, as ours has.
"""

from __future__ import annotations

import ctypes
import importlib
import time
from collections.abc import Sequence
from types import ModuleType
from typing import cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.peer_child import Json, Loaded, serve

BATCH_TOKENS = 2048  # llama.cpp's own defaults: of a call, and of the pieces that it computes
PIECE_TOKENS = 512
STREAM_TOKENS = 384  # of each of several sequences: prompt and all steps of a case
CACHE_TYPES = {"float32": 0, "bfloat16": 30}  # enum ggml_type


class Context:
    """A llama_context: so many sequences of so many tokens each."""

    def __init__(self, library: ModuleType, model: object, request: Json, streams: int, stream_tokens: int) -> None:
        params = library.llama_context_default_params()
        params.n_ctx = streams * stream_tokens
        params.n_seq_max = streams
        params.n_batch, params.n_ubatch = BATCH_TOKENS, PIECE_TOKENS
        params.n_threads = params.n_threads_batch = request["threads"]
        params.type_k = params.type_v = CACHE_TYPES[cast(str, request["dtype"])]
        self._library = library
        self._vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        self._context = library.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError(f"no llama_context of {streams} streams of {stream_tokens} tokens")
        self._batch = library.llama_batch_init(BATCH_TOKENS, 0, 1)

    def prefill(self, stream: int, prompt: Sequence[int]) -> int:
        """The first token after `prompt`, which begins the stream."""
        for start in range(0, len(prompt), BATCH_TOKENS):
            piece = prompt[start : start + BATCH_TOKENS]
            positions = range(start, start + len(piece))
            last = start + len(piece) == len(prompt)
            drawn = self._decode(piece, positions, [stream] * len(piece), [*[False] * (len(piece) - 1), last])
        return drawn[0]

    def step(self, tokens: Sequence[int], position: int) -> list[int]:
        """One token of each stream, all at the same position."""
        return self._decode(tokens, [position] * len(tokens), range(len(tokens)), [True] * len(tokens))

    def clear(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), False)

    def close(self) -> None:
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._context)

    def _decode(
        self, tokens: Sequence[int], positions: Sequence[int], streams: Sequence[int], wanted: Sequence[bool]
    ) -> list[int]:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, (token, position, stream, want) in enumerate(zip(tokens, positions, streams, wanted, strict=True)):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, stream
            batch.logits[index] = want
        status = self._library.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens failed with {status}")
        rows = sum(wanted)
        if not rows:
            return []
        pointer = self._library.llama_get_logits(self._context)
        logits: NDArray[np.float32] = np.ctypeslib.as_array(
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), shape=(rows, self._vocabulary)
        )
        return [int(token) for token in logits.argmax(axis=1)]


class LlamaEngine:
    """A PeerEngine."""

    def __init__(self, library: ModuleType, model: object, request: Json) -> None:
        self._library = library
        self._model = model
        self._request = request
        self._one = self._context(1, cast(int, request["max_tokens"]))
        self._many: Context | None = None
        self._tokens: list[int] = []
        self._position = 0

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        many = self._many = self._context(len(prompts), STREAM_TOKENS)
        self._tokens = [many.prefill(stream, prompt) for stream, prompt in enumerate(prompts)]
        self._position = len(prompts[0])

    def step_s(self) -> float:
        if self._many is None:
            raise RuntimeError("begin comes first")
        start_s = time.perf_counter()
        self._tokens = self._many.step(self._tokens, self._position)
        elapsed_s = time.perf_counter() - start_s
        self._position += 1
        return elapsed_s

    def end(self) -> None:
        if self._many is not None:
            self._many.close()
        self._many = None

    def prefill_s(self, prompt: Sequence[int]) -> float:
        self._one.clear()
        start_s = time.perf_counter()
        self._one.prefill(0, prompt)
        return time.perf_counter() - start_s

    def greedy_tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        self._one.clear()
        drawn = [self._one.prefill(0, prompt)]
        while len(drawn) < count:
            drawn += self._one.step(drawn[-1:], len(prompt) + len(drawn) - 1)
        return drawn

    def _context(self, streams: int, stream_tokens: int) -> Context:
        return Context(self._library, self._model, self._request, streams, stream_tokens)


def load(request: Json) -> Loaded:
    library = importlib.import_module("llama_cpp")  # by name: it is not installed where this file is type-checked
    library.llama_backend_init()
    model = library.llama_model_load_from_file(
        cast(str, request["model_path"]).encode(), library.llama_model_default_params()
    )
    if not model:
        raise RuntimeError(f"llama.cpp does not load {request['model_path']}; its log says why")
    settings = {
        "batch_tokens": BATCH_TOKENS,
        "piece_tokens": PIECE_TOKENS,
        "system": library.llama_print_system_info().decode().strip(),
    }
    return Loaded(LlamaEngine(library, model, request), library.__version__, settings)


if __name__ == "__main__":
    serve(load)
