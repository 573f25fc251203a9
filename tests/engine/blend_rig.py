"""Owns how the tests of blending run a model: whole prefills by the engine's forward pass, blends, and their KV."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.blend import Blended, BlendPass, BlendPrompt
from engine.blend_selection import Recipe
from engine.block_tables import Table
from engine.chunk_kv import ChunkIsolation, PlacedChunk, ResidentChunk
from engine.forward import ForwardPass
from engine.kernel_attention import KernelAttention
from engine.kv_memory import TORCH_DTYPES, KvMemory
from engine.loaded_model import LoadedModel, load_model
from engine.paged_attention import PagedAttention
from engine.prefix_index import KeyChain
from engine.scattered_attention import open_scattered
from engine.schedule import Part
from engine.sequences import DispatchState
from engine.sequences import Sequence as TokenSequence
from engine.step_batch import StepBuffers
from engine.torch_attention import TorchAttention
from service_kit.config import EngineConfig, ModelConfig
from tests.engine.rig import MIB, work

PAGE = 16


@dataclass(frozen=True, slots=True)
class Kv:
    """Rotated keys and values [layers, tokens, kv_heads, head_dim] in float64, and the logits of the last token."""

    key: torch.Tensor
    value: torch.Tensor
    logits: torch.Tensor

    def error(self, exact: Kv, layers: slice = slice(None)) -> float:
        """Of keys and values, relative."""
        pairs = ((self.key, exact.key), (self.value, exact.value))
        return sum(float((got - wanted)[layers].norm() / wanted[layers].norm()) for got, wanted in pairs)


@dataclass(frozen=True, slots=True)
class BlendRig:
    model: LoadedModel
    memory: KvMemory

    @classmethod
    def open(cls, model_dir: Path, kernels: str = "auto", *, kv_dtype: str = "auto", threads: int = 1) -> BlendRig:
        settings = {"kv_bytes": 24 * MIB, "threads": threads, "kernels": kernels, "kv_dtype": kv_dtype}
        model = ModelConfig.model_validate({"path": str(model_dir), "device": "cpu", "dtype": "float32"})
        return cls(*load_model(model, EngineConfig.model_validate(settings)))

    def blocks(self, tokens: int) -> np.ndarray:
        """Scattered over the pool, and never its first one."""
        count = self.model.layout.blocks
        return np.array([(7 * page + 3) % count for page in range(-(-tokens // PAGE))], dtype=np.int32)

    def isolate(self, token_ids: Sequence[int]) -> ResidentChunk:
        dtype = TORCH_DTYPES[self.model.layout.dtype]
        return ChunkIsolation(self.model.decoder, self.model.kernels, dtype).isolate(token_ids)

    def placed(self, token_ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[PlacedChunk]:
        return [PlacedChunk(start, self.isolate(token_ids[start:end])) for start, end in spans]

    def full(self, token_ids: Sequence[int]) -> Kv:
        hidden = self.prefill(token_ids, len(token_ids))
        return self._kv(token_ids, hidden[-1:])

    def prefill(self, token_ids: Sequence[int], count: int) -> torch.Tensor:
        """The engine's own forward pass over the first `count` tokens in one step."""
        self.memory.pool.fill_(100.0)  # finite: torch's attention weighs what lies behind the last token with 0
        state = DispatchState(work(1, token_ids), "generate", "active", 0, 0.0, {0})
        chain = KeyChain(PAGE, b"", 0)
        table = Table(array("i", self.blocks(len(token_ids)).tolist()), chain)
        part = Part(TokenSequence(state, (0,), array("i", token_ids), chain, table), count)
        batch = StepBuffers(PAGE, self.model.device).build([part])
        with torch.inference_mode():
            return ForwardPass(self.model.decoder, self._attention()).run(batch, lambda layer: None)

    def blend(
        self, token_ids: Sequence[int], chunks: Sequence[PlacedChunk], recipe: Recipe, past: int = 0
    ) -> tuple[Kv, Blended]:
        if past:
            self.prefill(token_ids, past)
        else:
            self.memory.pool.fill_(float("nan"))
        attention = open_scattered(self.memory.pool, self.model.kernels, self.model.spec.windows)
        prompt = BlendPrompt(token_ids, self.blocks(len(token_ids)), chunks, past)
        written: list[int] = []
        blended = BlendPass(self.model.decoder, attention).run(prompt, recipe, written.append)
        assert written == list(range(self.model.spec.layers))
        return self._kv(token_ids, blended.hidden), blended

    def _attention(self) -> PagedAttention:
        pool, kernels, windows = self.memory.pool, self.model.kernels, self.model.spec.windows
        return TorchAttention(pool, windows) if kernels is None else KernelAttention(pool, kernels, windows, share=True)

    def _kv(self, token_ids: Sequence[int], hidden: torch.Tensor) -> Kv:
        pages = self.memory.pool[:, torch.from_numpy(self.blocks(len(token_ids)).astype(np.int64))].double()
        key, value = (pages[:, :, half].flatten(1, 2)[:, : len(token_ids)].clone() for half in (0, 1))
        with torch.inference_mode():
            return Kv(key, value, self.model.decoder.head(hidden)[0].double())


def prompt_of(tokens: int, seed: int = 5, vocab: int = 512) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, vocab) for _ in range(tokens)]
