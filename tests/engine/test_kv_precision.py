"""What a narrower KV pool costs: KL of the next-token distributions against a float32 pool, in nats, on the shipped model.

Over text held out of its training. The figures in `engine.kv_dtype`'s description are what this test prints (`pytest -s`).
"""

from __future__ import annotations

import sys

import pytest
import torch
from tokenizers import Tokenizer

from engine.protocol import PromptLogprobs
from tests.engine.rig import SHIPPED, generate, open_native, sampling, work
from training.corpus import read_corpus

TOKENS = 128  # of each document
VOCABULARY = 4096
BOUNDS = {"bfloat16": 1e-3, "float8_e4m3": 2e-2}  # of the mean


def distributions(kv_dtype: str) -> torch.Tensor:
    """Log-probabilities of every position, float64 [positions, vocabulary]."""
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    engine, recorder = open_native(SHIPPED, {"kv_dtype": kv_dtype, "prefill_chunk": 64})
    for key, document in enumerate(read_corpus().held_out):
        prompt = tokenizer.encode(document.text).ids[:TOKENS]
        generate(engine, work(key, prompt, sampling(1, prompt_logprobs=VOCABULARY)))
    engine.close()
    rows = [row for event in recorder.of(PromptLogprobs) for row in event.rows]
    found = torch.full((len(rows), VOCABULARY), float("-inf"), dtype=torch.float64)
    for line, row in zip(found, rows, strict=True):
        line[torch.tensor(row.token_ids)] = torch.tensor(row.logprobs, dtype=torch.float64)
    assert found.isfinite().all(), "every token of the vocabulary"
    return found


@pytest.fixture(scope="module")
def wide() -> torch.Tensor:
    return distributions("float32")


@pytest.mark.parametrize("kv_dtype", BOUNDS)
def test_a_narrower_pool_moves_the_next_token_little(wide: torch.Tensor, kv_dtype: str) -> None:
    given = distributions(kv_dtype)
    divergence = (wide.exp() * (wide - given)).sum(-1)
    same = (wide.argmax(-1) == given.argmax(-1)).double().mean()
    sys.stdout.write(f"\n{kv_dtype}: mean KL {divergence.mean():.2g} nats, 99th percentile {divergence.quantile(0.99):.2g}, "
                     f"same likeliest token {same:.1%}, {len(wide)} positions")  # fmt: skip
    assert 1e-6 < divergence.mean() < BOUNDS[kv_dtype], "0 would be a pool that is float32 after all"
