"""Decode steps over recorded pieces: buckets, static buffers and bounds, with a capture that runs the piece again.

No GPU is needed; nothing here has run on one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.block_lines import PlacedBlocks
from engine.cuda_graphs import BUCKETS, Capture, DecodeGraphs, EagerPieces, GraphLimits
from engine.forward import ForwardPass
from engine.loaded_model import LoadedModel, load_model
from engine.native import NativeEngine
from engine.protocol import StepTokens, Submit
from engine.step_batch import StepBatch
from service_kit.config import EngineConfig, ModelConfig
from tests.engine.rig import MIB, Recorder, generate, sampling, work

AT_ONCE = GraphLimits(uses=1)


@dataclass(slots=True)
class Again:
    """A Capture on the CPU: replay is a second run of the piece. Counts both."""

    captures: int = 0
    replays: int = 0

    def __call__(self, piece: Callable[[], None]) -> Callable[[], None]:
        piece()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            piece()

        return replay


@dataclass(slots=True)
class Broken:
    calls: list[None] = field(default_factory=list)

    def __call__(self, piece: Callable[[], None]) -> Callable[[], None]:
        self.calls.append(None)
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> LoadedModel:
    """Over the C++ kernels, whose rows have the same bits in every batch."""
    model, memory = load_model(
        ModelConfig(path=str(model_dir), device="cpu", dtype="float32"), EngineConfig(kv_bytes=4 * MIB, threads=1)
    )
    memory.close()
    assert model.kernels is not None
    return model


def decodes(model: LoadedModel, rows: int, seed: int) -> StepBatch:
    """Rows of one token each. The parts are not looked into: only their number is."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 900, (rows,), generator=generator)
    token_ids = torch.randint(0, model.spec.vocab, (rows,), generator=generator)
    none: tuple[object, ...] = (None,) * rows
    blocks = PlacedBlocks(np.zeros((rows, 64), dtype=np.int32), np.arange(rows))
    highest = int(positions.max())
    return StepBatch(none, tuple(range(rows)), token_ids, positions, positions, highest, blocks)  # type: ignore[arg-type]


def attended(model: LoadedModel, rows: int, layer: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(layer)
    return torch.randn(rows, model.spec.heads, model.spec.head_dim, generator=generator)


@torch.inference_mode()
def assert_same_bits(model: LoadedModel, graphs: DecodeGraphs, batch: StepBatch) -> None:
    rows, last = len(batch.token_ids), model.spec.layers - 1
    eager, graphed = EagerPieces(model.decoder), graphs.pieces(batch)
    assert graphed is not None
    wanted, got = eager.begin(batch), graphed.begin(batch)
    for layer in range(last):
        assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
        wanted = eager.between(layer, attended(model, rows, layer))
        got = graphed.between(layer, attended(model, rows, layer))
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    hidden = graphed.end(attended(model, rows, last))
    assert torch.equal(hidden, eager.end(attended(model, rows, last)))


def test_a_batch_padded_to_its_bucket_gives_the_bits_of_the_batch_alone(loaded: LoadedModel) -> None:
    graphs = DecodeGraphs(loaded.decoder, Again(), AT_ONCE)
    for seed, rows in enumerate((1, 3, 5, 17, 4, 30, 2, 7, 256)):
        assert_same_bits(loaded, graphs, decodes(loaded, rows, seed))


@torch.inference_mode()
def test_with_torchs_products_a_padded_batch_is_the_batch_alone_but_for_rounding(model_dir: Path) -> None:
    model, memory = load_model(
        ModelConfig(path=str(model_dir), device="cpu", dtype="float32"),
        EngineConfig(kv_bytes=4 * MIB, threads=1, kernels="torch"),
    )
    memory.close()
    batch = decodes(model, 5, 1)
    eager, graphed = EagerPieces(model.decoder), DecodeGraphs(model.decoder, Again(), AT_ONCE).pieces(batch)
    assert graphed is not None
    for got, wanted in zip(graphed.begin(batch), eager.begin(batch), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_content_left_by_a_larger_batch_changes_nothing(loaded: LoadedModel) -> None:
    graphs = DecodeGraphs(loaded.decoder, Again(), AT_ONCE)
    assert_same_bits(loaded, graphs, decodes(loaded, 8, 1))
    graphs._buffers.hidden.fill_(float("nan"))
    graphs._buffers.attended.fill_(float("nan"))
    assert_same_bits(loaded, graphs, decodes(loaded, 5, 2))


def test_a_bucket_is_recorded_once_and_then_replayed(loaded: LoadedModel) -> None:
    again = Again()
    graphs = DecodeGraphs(loaded.decoder, again, AT_ONCE)
    for seed, rows in enumerate((5, 6, 8, 7)):
        assert_same_bits(loaded, graphs, decodes(loaded, rows, seed))
    pieces = loaded.spec.layers + 1
    assert (graphs.recorded, again.captures, again.replays) == ((8,), pieces, 4 * pieces)


def test_a_bucket_in_passing_is_not_recorded(loaded: LoadedModel) -> None:
    graphs = DecodeGraphs(loaded.decoder, Again(), GraphLimits(uses=3))
    assert [graphs.pieces(decodes(loaded, 2, 1)) is not None for _ in range(4)] == [False, False, True, True]


def test_the_bucket_not_used_for_the_longest_time_makes_room(loaded: LoadedModel) -> None:
    graphs = DecodeGraphs(loaded.decoder, Again(), GraphLimits(recordings=2, uses=1))
    for rows in (1, 2, 1, 4):
        graphs.pieces(decodes(loaded, rows, 1))
    assert graphs.recorded == (1, 4)


def test_buffers_stay_within_their_bytes_and_larger_batches_run_eagerly(loaded: LoadedModel) -> None:
    row_bytes = DecodeGraphs(loaded.decoder, Again()).row_bytes
    graphs = DecodeGraphs(loaded.decoder, Again(), GraphLimits(buffer_bytes=20 * row_bytes, uses=1))
    assert graphs.buffer_bytes == 16 * row_bytes
    assert graphs.pieces(decodes(loaded, 16, 1)) is not None
    assert graphs.pieces(decodes(loaded, 17, 1)) is None
    none = DecodeGraphs(loaded.decoder, Again(), GraphLimits(buffer_bytes=1, uses=1))
    assert none.pieces(decodes(loaded, 1, 1)) is None
    assert DecodeGraphs(loaded.decoder, Again(), AT_ONCE).pieces(decodes(loaded, BUCKETS[-1] + 1, 1)) is None


def test_a_capture_that_fails_is_not_tried_again(loaded: LoadedModel) -> None:
    broken = Broken()
    graphs = DecodeGraphs(loaded.decoder, broken, AT_ONCE)
    for rows in (1, 2, 1):
        assert graphs.pieces(decodes(loaded, rows, 1)) is None
    assert len(broken.calls) == 1


# ---- whole steps


def log_probabilities(model_dir: Path, capture: Capture | None) -> tuple[list[object], tuple[int, ...]]:
    """Of every token of a few requests of different lengths, and the buckets that were recorded."""
    recorder = Recorder()
    engine = NativeEngine.open(
        ModelConfig(path=str(model_dir), device="cpu", dtype="float32"),
        EngineConfig(kv_bytes=16 * MIB, threads=1, prefill_chunk=40),
        recorder,
    )
    graphs = None if capture is None else DecodeGraphs(engine._model.decoder, capture, AT_ONCE)
    engine._forward = ForwardPass(engine._model.decoder, engine._forward._attention, graphs)
    generate(engine, *(work(key, list(range(5, 5 + 30 * key)), sampling(4 * key, logprobs=5)) for key in range(1, 6)))
    engine.handle(Submit(work(9, [7], sampling(3)), "generate"))  # a prompt of one row is a step like a decode
    while engine.step():
        pass
    engine.close()
    steps = recorder.of(StepTokens)
    return [(step.token_ids, step.logprobs) for step in steps], () if graphs is None else graphs.recorded


def test_an_engine_over_recorded_pieces_draws_the_same_tokens_at_the_same_bits(model_dir: Path) -> None:
    eager, _ = log_probabilities(model_dir, None)
    graphed, recorded = log_probabilities(model_dir, Again())
    assert set(recorded) == {1, 2, 4}
    assert graphed == eager
