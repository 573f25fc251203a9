"""Whole forward passes on a device that is not the CPU, as far as that goes without one: shapes, types and where tensors lie.

torch's fake tensors on the meta device refuse an operation over tensors of two devices, as CUDA does. No number is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.checkpoint import Checkpoint
from engine.cuda_graphs import DecodeGraphs, GraphLimits
from engine.cuda_varlen import VarlenAttention, installed_varlen
from engine.decoder import Decoder
from engine.forward import ForwardPass
from engine.model_spec import ModelSpec
from engine.operations import TorchOperations
from engine.paged_attention import PagedAttention
from engine.step_batch import StepBatch, StepBuffers
from engine.torch_attention import TorchAttention
from engine.weights import WeightReader
from tests.engine.rig import families, generate, open_native, sampling, save_random, work

ELSEWHERE = torch.device("meta")


def decoder_elsewhere(directory: Path) -> Decoder:
    spec, operations = ModelSpec.load(directory), TorchOperations(torch.bfloat16)
    with Checkpoint(directory) as checkpoint:
        weights = WeightReader(checkpoint, spec, operations, torch.bfloat16, ELSEWHERE).model()
    return Decoder(spec, weights, operations, ELSEWHERE)


def attention_elsewhere(name: str, pool: torch.Tensor, windows: tuple[int, ...]) -> PagedAttention:
    if name == "torch":
        return TorchAttention(pool, windows)
    kernel = installed_varlen()
    assert kernel is not None
    return VarlenAttention(pool, windows, kernel, "paged" if name == "paged" else "packed")


class Shadow:
    """A ForwardPass on the CPU; every batch runs elsewhere first."""

    def __init__(self, here: ForwardPass, elsewhere: ForwardPass, page_tokens: int) -> None:
        self.shapes: list[tuple[int, int]] = []  # rows, parts
        self._here = here
        self._elsewhere = elsewhere
        self._page_tokens = page_tokens

    def run(self, batch: StepBatch, layer_written: Callable[[int], None]) -> torch.Tensor:
        with FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False):
            moved = StepBuffers(self._page_tokens, ELSEWHERE).build(batch.parts)
            hidden = self._elsewhere.run(moved, lambda layer: None)
            logits = self._elsewhere._decoder.head(hidden[:1])
        assert hidden.device == logits.device == ELSEWHERE
        assert len(hidden) == len(batch.token_ids)
        self.shapes.append((len(batch.token_ids), len(batch.parts)))
        return self._here.run(batch, layer_written)


@pytest.mark.parametrize(
    ("family", "attention"), [("mistral-window", "torch"), ("mistral-window", "paged"), ("qwen3", "packed")]
)
def test_a_pass_keeps_to_its_device_and_its_shapes(tmp_path: Path, family: str, attention: str) -> None:
    save_random(families()[family], tmp_path)
    decoder = decoder_elsewhere(tmp_path)
    engine, _ = open_native(tmp_path, {"prefill_chunk": 40})
    pool = torch.empty(engine._memory.pool.shape, dtype=torch.bfloat16, device=ELSEWHERE)
    recorded = DecodeGraphs(decoder, _again, GraphLimits(uses=1))
    elsewhere = ForwardPass(decoder, attention_elsewhere(attention, pool, decoder.spec.windows), recorded)
    shadow = Shadow(engine._forward, elsewhere, engine._tables.page_tokens)
    engine._forward = shadow  # type: ignore[assignment]
    generate(engine, *(work(key, list(range(5, 5 + 45 * key)), sampling(4)) for key in range(1, 3)))
    engine.close()
    rows, parts = zip(*shadow.shapes, strict=True)
    assert any(1 < few < many for many, few in shadow.shapes)  # decodes and a chunk in one batch
    assert max(rows) > max(parts)
    assert recorded.recorded


def _again(piece: Callable[[], None]) -> Callable[[], None]:
    piece()
    return piece
