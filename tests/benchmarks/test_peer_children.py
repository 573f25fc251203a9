"""The children of llama.cpp and OpenVINO GenAI over stand-ins that draw the number after the last token."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import cast

import pytest

from benchmarks.llama_child import BATCH_TOKENS, LlamaEngine
from benchmarks.openvino_child import OpenVinoEngine
from benchmarks.peer_child import PeerEngine

VOCABULARY = 5000


class LlamaContext:
    def __init__(self, streams: int, stream_tokens: int) -> None:
        self.limit = stream_tokens
        self.lengths = [0] * streams
        self.logits = (ctypes.c_float * 0)()


class LlamaLibrary:
    """Refuses a token that does not follow the last one of its stream."""

    def llama_context_default_params(self) -> SimpleNamespace:
        return SimpleNamespace()

    def llama_model_get_vocab(self, model: object) -> object:
        return model

    def llama_vocab_n_tokens(self, vocabulary: object) -> int:
        return VOCABULARY

    def llama_init_from_model(self, model: object, params: SimpleNamespace) -> LlamaContext:
        return LlamaContext(params.n_seq_max, params.n_ctx // params.n_seq_max)

    def llama_batch_init(self, tokens: int, embeddings: int, streams: int) -> SimpleNamespace:
        columns = {name: [0] * tokens for name in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(n_tokens=0, seq_id=[[0] * streams for _ in range(tokens)], **columns)

    def llama_decode(self, context: LlamaContext, batch: SimpleNamespace) -> int:
        drawn = []
        for index in range(batch.n_tokens):
            stream = batch.seq_id[index][0]
            if batch.pos[index] != context.lengths[stream] or context.lengths[stream] == context.limit:
                return 1
            context.lengths[stream] += 1
            if batch.logits[index]:
                drawn.append(batch.token[index] + 1)
        context.logits = (ctypes.c_float * (len(drawn) * VOCABULARY))()
        for row, token in enumerate(drawn):
            context.logits[row * VOCABULARY + token] = 1.0
        return 0

    def llama_get_logits(self, context: LlamaContext) -> object:
        return context.logits

    def llama_get_memory(self, context: LlamaContext) -> LlamaContext:
        return context

    def llama_memory_clear(self, context: LlamaContext, data: bool) -> None:
        context.lengths = [0] * len(context.lengths)

    def llama_batch_free(self, batch: SimpleNamespace) -> None:
        pass

    def llama_free(self, context: LlamaContext) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Drawn:
    generated_ids: list[int]


class Handle:
    def __init__(self, last: int, left: int) -> None:
        self.last, self.left = last, left
        self.unread: list[int] = []

    def can_read(self) -> bool:
        return bool(self.unread)

    def read(self) -> dict[int, Drawn]:
        return {0: Drawn([self.unread.pop(0)])}

    def cancel(self) -> None:
        self.left = 0


class Pipeline:
    """Takes one step per prompt to prefill it, as a small token budget would."""

    def __init__(self) -> None:
        self.waiting: list[Handle] = []
        self.running: list[Handle] = []

    def add_request(self, request_id: int, prompt: object, config: object) -> Handle:
        handle = Handle(cast(list[int], prompt)[-1], cast(SimpleNamespace, config).max_new_tokens)
        self.waiting.append(handle)
        return handle

    def step(self) -> None:
        self.running += [self.waiting.pop(0)] if self.waiting else []
        self.running = [handle for handle in self.running if handle.left]
        for handle in self.running:
            handle.last, handle.left = handle.last + 1, handle.left - 1
            handle.unread.append(handle.last)

    def has_non_finished_requests(self) -> bool:
        return bool(self.waiting) or any(handle.left for handle in self.running)


def llama() -> PeerEngine:
    request = {"dtype": "float32", "threads": 1, "max_tokens": 2 * BATCH_TOKENS}
    return LlamaEngine(cast(ModuleType, LlamaLibrary()), object(), request)


def openvino() -> PeerEngine:
    library = cast(ModuleType, SimpleNamespace(GenerationConfig=SimpleNamespace))
    return OpenVinoEngine(library, list, Pipeline())


@pytest.fixture(params=[llama, openvino])
def engine(request: pytest.FixtureRequest) -> Iterator[PeerEngine]:
    made: PeerEngine = request.param()
    yield made
    made.end()


def test_tokens_are_drawn_greedily_one_after_the_other(engine: PeerEngine) -> None:
    assert engine.greedy_tokens([5, 6, 7], 4) == [8, 9, 10, 11]
    assert engine.greedy_tokens([1], 2) == [2, 3]


def test_every_step_decodes_one_token_of_each_prompt(engine: PeerEngine) -> None:
    for batch in (3, 1):
        engine.begin([[100 * number, 100 * number + 1] for number in range(batch)])
        assert all(engine.step_s() >= 0 for _ in range(5))
        engine.end()


def test_a_prompt_longer_than_one_call_is_prefilled_in_pieces_and_leaves_nothing(engine: PeerEngine) -> None:
    prompt = list(range(BATCH_TOKENS + 10))
    assert engine.prefill_s(prompt) > 0
    assert engine.prefill_s(prompt) > 0
    assert engine.greedy_tokens(prompt, 1) == [BATCH_TOKENS + 10]
