"""What each token before a token adds to its compute, from the shape of the model alone."""

from __future__ import annotations

import pytest

from engine.model_spec import ModelSpec
from engine.native import NativeEngine
from engine.token_growth import token_growth
from tests.engine.rig import Recorder

# Of a layer: 2 * 32 * (4 + 2) * 8 weights of projections, 3 * 32 * 48 of the feed-forward; attention 4 * 4 * 8 FLOP per key.
DENSE: dict[str, object] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
EXPERTS: dict[str, object] = {
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "mlp_only_layers": [1],
}


def test_an_engine_tells_the_growth_of_its_model(native: tuple[NativeEngine, Recorder]) -> None:
    engine, _ = native
    # SMALL of the rig: 6 + 2 heads of 16, hidden 96, feed-forward 160
    assert engine.ready().token_growth == pytest.approx(4 * 6 * 16 / (2 * (2 * 96 * 8 * 16 + 3 * 96 * 160)))


def growth(**changes: object) -> float:
    return token_growth(ModelSpec.of({**DENSE, **changes}, {}))


def test_growth_is_attention_per_key_over_the_products_with_weights() -> None:
    assert growth() == pytest.approx(128 / (2 * (3072 + 4608)))


def test_layers_and_vocabulary_change_nothing() -> None:
    assert growth(num_hidden_layers=7, vocab_size=1024) == pytest.approx(growth())


def test_of_experts_only_those_count_that_a_token_meets() -> None:
    routed, dense = 3072 + 32 * (8 + 3 * 2 * 64), 3072 + 4608
    assert growth(**EXPERTS) == pytest.approx(2 * 128 / (2 * (routed + dense)))


def test_layers_with_a_window_do_not_grow() -> None:
    assert growth(model_type="mistral", sliding_window=128) == 0.0
    half = growth(model_type="qwen2", use_sliding_window=True, sliding_window=128, max_window_layers=1)
    assert half == pytest.approx(growth() / 2)
