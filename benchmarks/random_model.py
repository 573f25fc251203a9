"""Owns the model of the benchmarks: a Llama checkpoint of 100M parameters with random weights, in the Hugging Face format."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True, slots=True)
class LlamaShape:
    layers: int = 12
    hidden: int = 768
    heads: int = 12
    kv_heads: int = 4
    head_dim: int = 64
    intermediate: int = 2048
    vocab: int = 32_000
    context_tokens: int = 32_768
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def kv_elements_per_token(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Tied embeddings counted once."""
        return sum(math.prod(size) for _, size in _tensors(self))


SHIPPED = Path(__file__).parent.parent / "models" / "pdserve-tiny"
LLAMA_100M = LlamaShape()
DESCRIPTION = "random Llama, 12 layers, hidden 768, 12/4 heads of 64, ffn 2048, vocabulary 32,000, tied"


def write_random_llama(folder: Path, shape: LlamaShape = LLAMA_100M, seed: int = 1) -> Path:
    """Writes config.json and model.safetensors (fp32, tied embeddings); returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator) * size[-1] ** -0.5
        for name, size in _tensors(shape)
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=1))
    return folder


def write_served_llama(folder: Path, shape: LlamaShape = LLAMA_100M) -> Path:
    """With the tokenizer of the shipped model: prompts are token ids, but a cluster serves no model without one."""
    write_random_llama(folder, shape)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, folder)
    return folder


def _tensors(shape: LlamaShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    yield "model.norm.weight", (shape.hidden,)
    for layer in range(shape.layers):
        root = f"model.layers.{layer}"
        yield f"{root}.input_layernorm.weight", (shape.hidden,)
        yield f"{root}.post_attention_layernorm.weight", (shape.hidden,)
        for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            yield f"{root}.self_attn.{name}_proj.weight", (heads * shape.head_dim, shape.hidden)
        yield f"{root}.self_attn.o_proj.weight", (shape.hidden, shape.heads * shape.head_dim)
        yield f"{root}.mlp.gate_proj.weight", (shape.intermediate, shape.hidden)
        yield f"{root}.mlp.up_proj.weight", (shape.intermediate, shape.hidden)
        yield f"{root}.mlp.down_proj.weight", (shape.hidden, shape.intermediate)


def _config(shape: LlamaShape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context_tokens,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
