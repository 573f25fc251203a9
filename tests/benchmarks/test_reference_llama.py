"""The float64 reference of the CUDA checks against transformers' own model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from benchmarks.random_model import LlamaShape, write_random_llama
from benchmarks.reference_llama import ReferenceLlama

SHAPE = LlamaShape(layers=2, hidden=128, heads=4, kv_heads=2, head_dim=64, intermediate=256, vocab=500)


def test_the_reference_computes_what_transformers_computes(tmp_path: Path) -> None:
    model_dir = write_random_llama(tmp_path, SHAPE)
    token_ids = list(range(10, 110))
    ours = ReferenceLlama(model_dir, SHAPE).log_probabilities(token_ids)
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    with torch.inference_mode():
        theirs = torch.log_softmax(model(input_ids=torch.tensor([token_ids])).logits[0], -1)
    assert (ours - theirs).abs().max() < 1e-5  # transformers rotates in float32 whatever the model's dtype
