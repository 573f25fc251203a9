"""What a narrower KV pool costs: KL of the next-token distributions against a float32 pool, in nats, on the shipped model.

Over text held out of its training. The figures in `engine.kv_dtype`'s description are those of `python -m benchmarks.approximations`.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.approximations import distributions, drift
from benchmarks.report import RESULTS, read_result
from service_kit.config import EngineConfig

BOUNDS = {"bfloat16": 1e-3, "float8_e4m3": 2e-2}  # of the mean


@pytest.fixture(scope="module")
def wide() -> torch.Tensor:
    return distributions("float32", threads=1)


@pytest.mark.parametrize("kv_dtype", BOUNDS)
def test_a_narrower_pool_moves_the_next_token_little_and_as_much_as_is_told(wide: torch.Tensor, kv_dtype: str) -> None:
    found = drift(wide, distributions(kv_dtype, threads=1))
    assert 1e-6 < found.mean_kl < BOUNDS[kv_dtype], "0 would be a pool that is float32 after all"
    told = EngineConfig.model_fields["kv_dtype"].description or ""
    measured = read_result(RESULTS / "approximations-full.json").measurements
    name = f"KV pool in {kv_dtype}: KL from a float32 pool, mean"
    recorded = next(each.figure.median for each in measured if each.name == name)
    assert f"{kv_dtype} {told_as(recorded)} nats" in told, told
    assert found.mean_kl == pytest.approx(recorded, rel=0.5), "other weights, or another pool, than those of the record"


def told_as(value: float) -> str:
    """0.0081 as 8e-3."""
    return f"{value:.0e}".replace("e-0", "e-")
