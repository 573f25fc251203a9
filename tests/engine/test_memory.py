"""What an engine takes of the machine's memory, and what a narrower KV pool costs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.native import NativeEngine
from engine.pool_size import CPU_POOL_BYTES, pool_bytes, resident_bytes
from engine.protocol import PromptLogprobs
from pdserve.errors import ConfigInvalid
from service_kit.config import EngineConfig, ModelConfig
from tests.engine.rig import SHIPPED, Recorder, assert_all_free, generate, open_native, sampling, work

CPU = torch.device("cpu")
REQUESTS, WARM_UP, BATCH = 10_000, 2_000, 50


class Silent(Recorder):
    """Keeps nothing: what grows is the engine's."""

    def emit(self, event: object) -> None:
        pass


def test_the_pool_is_what_was_asked_for_or_what_free_memory_allows() -> None:
    assert pool_bytes(EngineConfig(kv_bytes=1 << 20), CPU) == 1 << 20
    assert 0 < pool_bytes(EngineConfig(), CPU) <= CPU_POOL_BYTES
    assert pool_bytes(EngineConfig(memory_reserve=0.999), CPU) == 0


def test_a_pool_without_room_is_refused_with_the_reason(model_dir: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"engine\.memory_reserve leaves 0 bytes"):
        NativeEngine.open(ModelConfig(path=str(model_dir)), EngineConfig(memory_reserve=0.999), Recorder())


@pytest.mark.slow
def test_ten_thousand_requests_leave_no_memory_behind(model_dir: Path) -> None:
    model = ModelConfig.model_validate({"path": str(model_dir), "device": "cpu"})
    engine = NativeEngine.open(model, EngineConfig(kv_bytes=4 << 20, threads=1), Silent())
    source = random.Random(5)
    for first in range(0, REQUESTS, BATCH):
        if first == WARM_UP:
            before = resident_bytes()
        prompts = [[source.randrange(3, 512) for _ in range(source.randrange(1, 60))] for _ in range(BATCH)]
        generate(engine, *(work(first + n, prompt, sampling(2)) for n, prompt in enumerate(prompts)))
    assert resident_bytes() - before < 8 << 20
    assert engine.load().resident_bytes >= 4 << 20
    assert_all_free(engine)
    engine.close()


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_bfloat16_pool_under_float32_weights_costs_little(kernels: str) -> None:
    """KL of the next-token distributions against transformers in float32, over a text of the shipped model's kind."""
    reference = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    source = random.Random(8)
    prompt = [source.randrange(5, 4096) for _ in range(400)]
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    engine, recorder = open_native(SHIPPED, {"kv_dtype": "bfloat16", "kernels": kernels, "prefill_chunk": 64})
    generate(engine, work(0, prompt, sampling(1, prompt_logprobs=20)))
    engine.close()
    (rows,) = (event.rows for event in recorder.of(PromptLogprobs))
    given = torch.tensor([row.logprobs[1:] for row in rows])
    ids = torch.tensor([row.token_ids[1:] for row in rows])
    wanted = expected[: len(rows)].gather(1, ids)
    divergence = (wanted.exp() * (wanted - given)).sum(-1)  # over the 20 likeliest tokens of each position
    assert divergence.abs().mean() < 1e-3
    assert 0 < (wanted - given).abs().max() < 0.1, "the pool is not float32"
