"""Owns the weights of the decoder: Hugging Face tensor names and shapes, fused projections, on the compute device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.checkpoint import Checkpoint
from engine.experts import Experts, FeedForward, GatedUnit
from engine.linear import Linear
from engine.model_spec import ModelSpec
from engine.operations import Operations
from pdserve.errors import ModelUnsupported


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. qkv: q, k and v stacked. qk_norm: [heads + kv_heads, head_dim] or None."""

    input_norm: torch.Tensor
    qkv: Linear
    qk_norm: torch.Tensor | None
    output: Linear
    post_norm: torch.Tensor
    mlp: FeedForward


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embedding: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: Linear


class WeightReader:
    """Reads the tensors of `checkpoint` by their Hugging Face names, in the shapes that `spec` asks for."""

    def __init__(
        self, checkpoint: Checkpoint, spec: ModelSpec, operations: Operations, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._checkpoint = checkpoint
        self._spec = spec
        self._operations = operations
        self._dtype = dtype
        self._device = device
        self._read: set[str] = set()

    def model(self) -> ModelWeights:
        """All weights; refuses a checkpoint with tensors that this decoder would leave out."""
        spec = self._spec
        embedding = self._tensor("model.embed_tokens.weight", spec.vocab, spec.hidden)
        layers = tuple(self._layer(number) for number in range(spec.layers))
        final_norm = self._norm("model.norm.weight", spec.hidden)
        head = embedding if spec.tied else self._tensor("lm_head.weight", spec.vocab, spec.hidden)
        self._refuse_the_rest()
        return ModelWeights(embedding, layers, final_norm, self._operations.linear(head, None))

    def _layer(self, number: int) -> LayerWeights:
        spec = self._spec
        prefix = f"model.layers.{number}."
        attention = prefix + "self_attn."
        q_rows, kv_rows = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        qkv_parts = [(attention + "q_proj", q_rows), (attention + "k_proj", kv_rows), (attention + "v_proj", kv_rows)]
        return LayerWeights(
            input_norm=self._norm(prefix + "input_layernorm.weight", spec.hidden),
            qkv=self._linear(qkv_parts, spec.hidden, spec.qkv_bias),
            qk_norm=self._qk_norm(attention) if spec.qk_norm else None,
            output=self._linear([(attention + "o_proj", spec.hidden)], q_rows, spec.output_bias),
            post_norm=self._norm(prefix + "post_attention_layernorm.weight", spec.hidden),
            mlp=self._mlp(number, prefix + "mlp."),
        )

    def _mlp(self, layer: int, prefix: str) -> FeedForward:
        spec, experts = self._spec, self._spec.experts
        if experts is None or not experts.in_layer(layer):
            return self._unit(prefix, spec.intermediate, spec.mlp_bias)
        return Experts(
            router=self._linear([(prefix + "gate", experts.count)], spec.hidden, False),
            units=tuple(self._unit(f"{prefix}experts.{n}.", experts.intermediate, False) for n in range(experts.count)),
            per_token=experts.per_token,
            normalised=experts.normalised,
        )

    def _unit(self, prefix: str, intermediate: int, bias: bool) -> GatedUnit:
        gate_up_parts = [(prefix + "gate_proj", intermediate), (prefix + "up_proj", intermediate)]
        return GatedUnit(
            gate_up=self._operations.gated(*self._stacked(gate_up_parts, self._spec.hidden, bias)),
            down=self._linear([(prefix + "down_proj", self._spec.hidden)], intermediate, bias),
        )

    def _qk_norm(self, attention: str) -> torch.Tensor:
        """One weight row per query and key head, so that both are normalised in one call."""
        spec = self._spec
        query = self._norm(attention + "q_norm.weight", spec.head_dim).expand(spec.heads, -1)
        key = self._norm(attention + "k_norm.weight", spec.head_dim).expand(spec.kv_heads, -1)
        return torch.cat([query, key])

    def _linear(self, parts: Sequence[tuple[str, int]], columns: int, bias: bool) -> Linear:
        return self._operations.linear(*self._stacked(parts, columns, bias))

    def _stacked(
        self, parts: Sequence[tuple[str, int]], columns: int, bias: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight = torch.cat([self._tensor(f"{name}.weight", rows, columns) for name, rows in parts])
        biases = [self._tensor(f"{name}.bias", rows) for name, rows in parts] if bias else []
        return weight, torch.cat(biases) if biases else None

    def _norm(self, name: str, count: int) -> torch.Tensor:
        return self._tensor(name, count).to(self._operations.dtype)

    def _tensor(self, name: str, *shape: int) -> torch.Tensor:
        self._read.add(name)
        return self._checkpoint.tensor(name, shape, self._dtype).to(self._device)

    def _refuse_the_rest(self) -> None:
        unread = sorted(self._checkpoint.names() - self._read)
        strange = [name for name in unread if not _is_harmless(name, self._spec.tied)]
        if strange:
            raise ModelUnsupported(
                f"The checkpoint has {len(strange)} tensors that a {self._spec.family} decoder does not use, "
                f"{strange[0]!r} first: it is not the model that config.json describes."
            )


def _is_harmless(name: str, tied: bool) -> bool:
    """Buffers that old exports stored, and a head that is tied to the embedding anyway."""
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")
