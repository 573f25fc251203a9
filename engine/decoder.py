"""Owns the decoder of the Llama family in pieces: embed, pre(layer), post(layer), head. Attention comes between pre and post.

The pieces know neither batches nor caches: CacheBlend runs another token set per layer, offloading puts another process between
pre and post, and the KV hand-off takes each layer's K and V as soon as pre has made them.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from engine.model_spec import ModelSpec
from engine.operations import Operations
from engine.rotary import RotaryTable
from engine.weights import ModelWeights


class Decoder:
    def __init__(self, spec: ModelSpec, weights: ModelWeights, operations: Operations, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self._weights = weights
        self._operations = operations
        self._rotary = RotaryTable(spec.rope_theta, spec.head_dim, spec.rope_scaling, operations.dtype, device)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[n] int64 -> hidden [n, hidden]."""
        return F.embedding(token_ids, self._weights.embedding).to(self._operations.dtype)

    def rotary(self, positions: torch.Tensor, highest: int) -> torch.Tensor:
        """Cosines and sines [n, head_dim] for `pre`, once per step."""
        return self._rotary.rows(positions, highest)

    def pre(
        self, layer: int, hidden: torch.Tensor, rotary: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden [n, hidden] -> rotated q [n, heads, head_dim], rotated k and v [n, kv_heads, head_dim]."""
        query_key, value = self.project(layer, hidden)
        query_key = self.rotate(query_key, rotary)
        return query_key[:, : self.spec.heads], query_key[:, self.spec.heads :], value

    def project(self, layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first half of `pre`: q and k together [n, heads + kv_heads, head_dim], not rotated, and v [n, kv_heads, head_dim]."""
        spec, weights = self.spec, self._weights.layers[layer]
        rotated = spec.heads + spec.kv_heads
        normed = self._norm(hidden, weights.input_norm)
        qkv = weights.qkv(normed).view(-1, rotated + spec.kv_heads, spec.head_dim)
        query_key = qkv[:, :rotated]
        if weights.qk_norm is not None:
            query_key = self._operations.norm(query_key, weights.qk_norm, spec.norm_eps)
        return query_key, qkv[:, rotated:]

    def rotate(self, heads: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """Rotates [n, any heads, head_dim] to the positions of `rotary`, perhaps in place."""
        return self._operations.rotate(heads, rotary)

    def post(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Residual stream after `layer`: attended [n, heads, head_dim] -> hidden [n, hidden]."""
        weights = self._weights.layers[layer]
        hidden = weights.output.onto(hidden, attended.reshape(len(hidden), -1))
        return weights.mlp.onto(hidden, self._norm(hidden, weights.post_norm))

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [n, hidden] -> logits [n, vocab], float32."""
        return self._weights.head(self._norm(hidden, self._weights.final_norm)).float()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._operations.norm(x, weight, self.spec.norm_eps)
