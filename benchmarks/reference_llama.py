"""Owns a Llama forward pass written for clarity, in the precision it is asked for: the reference of the CUDA checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from benchmarks.random_model import LlamaShape


class ReferenceLlama:
    """Whole sequences only, no cache. Follows the formulas of the LLaMA and RoFormer papers."""

    def __init__(self, model_dir: Path, shape: LlamaShape, dtype: torch.dtype = torch.float64) -> None:
        self._shape = shape
        self._dtype = dtype
        loaded = load_file(model_dir / "model.safetensors")
        self._weights = {name: tensor.to(dtype) for name, tensor in loaded.items()}

    @torch.inference_mode()
    def log_probabilities(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[tokens, vocab]: row i is the distribution of token i + 1."""
        embedding = self._weights["model.embed_tokens.weight"]
        hidden = F.embedding(torch.tensor(token_ids), embedding)
        cos, sin = self._rotation(len(token_ids))
        for layer in range(self._shape.layers):
            root = f"model.layers.{layer}"
            normed = self._norm(hidden, f"{root}.input_layernorm.weight")
            hidden = hidden + self._attention(normed, root, cos, sin)
            normed = self._norm(hidden, f"{root}.post_attention_layernorm.weight")
            hidden = hidden + self._feed_forward(normed, root)
        return torch.log_softmax(self._norm(hidden, "model.norm.weight") @ embedding.T, -1)

    def _rotation(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        half = torch.arange(0, self._shape.head_dim, 2, dtype=self._dtype) / self._shape.head_dim
        angle = torch.arange(tokens, dtype=self._dtype)[:, None] * self._shape.rope_theta**-half
        angle = torch.cat((angle, angle), -1)
        return angle.cos(), angle.sin()

    def _norm(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self._shape.norm_eps)
        return hidden * scale * self._weights[name]

    def _heads(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        projected: torch.Tensor = hidden @ self._weights[name].T
        return projected.view(len(hidden), -1, self._shape.head_dim).transpose(0, 1)

    def _attention(self, hidden: torch.Tensor, root: str, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        group = self._shape.heads // self._shape.kv_heads
        query = _rotate(self._heads(hidden, f"{root}.self_attn.q_proj.weight"), cos, sin)
        key = _rotate(self._heads(hidden, f"{root}.self_attn.k_proj.weight"), cos, sin).repeat_interleave(group, 0)
        value = self._heads(hidden, f"{root}.self_attn.v_proj.weight").repeat_interleave(group, 0)
        scores = query @ key.transpose(1, 2) / math.sqrt(self._shape.head_dim)
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        mixed: torch.Tensor = scores.masked_fill(future, float("-inf")).softmax(-1) @ value
        return mixed.transpose(0, 1).flatten(1) @ self._weights[f"{root}.self_attn.o_proj.weight"].T

    def _feed_forward(self, hidden: torch.Tensor, root: str) -> torch.Tensor:
        gate = F.silu(hidden @ self._weights[f"{root}.mlp.gate_proj.weight"].T)
        up = hidden @ self._weights[f"{root}.mlp.up_proj.weight"].T
        return (gate * up) @ self._weights[f"{root}.mlp.down_proj.weight"].T


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat((-second, first), -1) * sin
