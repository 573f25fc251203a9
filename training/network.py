"""The network being trained: a Llama decoder as one pure function of its weights, in float32."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]

INITIAL_EMBEDDING_STD = 0.02
INITIAL_HIDDEN_GAIN = 0.6


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of the decoder, in the words of the Hugging Face Llama configuration."""

    vocabulary: int = 4096
    hidden: int = 256
    intermediate: int = 768
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    max_positions: int = 4096
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5


def initial_weights(shape: Shape, generator: torch.Generator) -> Weights:
    """Return fresh weights under their Hugging Face names; input and output embeddings are tied.

    The projections that write to the residual stream start at zero, so every layer starts as the identity.
    """
    hidden, query, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def drawn(rows: int, columns: int, std: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * std

    def projection(rows: int, columns: int) -> Tensor:
        return drawn(rows, columns, INITIAL_HIDDEN_GAIN * columns**-0.5)

    weights = {"model.embed_tokens.weight": drawn(shape.vocabulary, hidden, INITIAL_EMBEDDING_STD)}
    for layer in range(shape.layers):
        name = f"model.layers.{layer}"
        weights |= {
            f"{name}.input_layernorm.weight": torch.ones(hidden),
            f"{name}.self_attn.q_proj.weight": projection(query, hidden),
            f"{name}.self_attn.k_proj.weight": projection(kv, hidden),
            f"{name}.self_attn.v_proj.weight": projection(kv, hidden),
            f"{name}.self_attn.o_proj.weight": torch.zeros(hidden, query),
            f"{name}.post_attention_layernorm.weight": torch.ones(hidden),
            f"{name}.mlp.gate_proj.weight": projection(shape.intermediate, hidden),
            f"{name}.mlp.up_proj.weight": projection(shape.intermediate, hidden),
            f"{name}.mlp.down_proj.weight": torch.zeros(hidden, shape.intermediate),
        }
    return weights | {"model.norm.weight": torch.ones(hidden)}


@dataclass(slots=True)
class Past:
    """Keys and values of the tokens that one layer has read, each (batch, kv_heads, length, head_dim)."""

    keys: Tensor
    values: Tensor

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys, self.values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        return self.keys, self.values


def empty_past(shape: Shape, batch: int) -> list[Past]:
    nothing = torch.zeros(batch, shape.kv_heads, 0, shape.head_dim)
    return [Past(nothing, nothing) for _ in range(shape.layers)]


def rotary_tables(shape: Shape, length: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of rotary position embedding (Su et al. 2021), each (length, head_dim / 2)."""
    steps = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(start, start + length, dtype=torch.float32), shape.rope_theta**-steps)
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    cosines, sines = tables
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


def hidden_states(shape: Shape, weights: Weights, tokens: Tensor, past: list[Past] | None = None) -> Tensor:
    """Return the last hidden states (batch, length, hidden), after the final norm, of int64 tokens (batch, length).

    `past` is extended in place by the tokens; several at once are allowed only while it is empty.
    """
    tables = rotary_tables(shape, tokens.shape[1], past[0].keys.shape[2] if past else 0)
    x = F.embedding(tokens, weights["model.embed_tokens.weight"])
    for layer in range(shape.layers):
        name = f"model.layers.{layer}"
        normed = _normed(shape, weights, f"{name}.input", x)
        x = x + _attention(shape, weights, f"{name}.self_attn", normed, (tables, past[layer] if past else None))
        x = x + _mlp(weights, f"{name}.mlp", _normed(shape, weights, f"{name}.post_attention", x))
    return F.rms_norm(x, (shape.hidden,), weights["model.norm.weight"], shape.norm_epsilon)


def _normed(shape: Shape, weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.rms_norm(x, (shape.hidden,), weights[f"{name}_layernorm.weight"], shape.norm_epsilon)


def _attention(
    shape: Shape, weights: Weights, name: str, x: Tensor, place: tuple[tuple[Tensor, Tensor], Past | None]
) -> Tensor:
    batch, length, _ = x.shape
    tables, past = place

    def heads(projection: str, count: int) -> Tensor:
        projected = F.linear(x, weights[f"{name}.{projection}.weight"])
        return projected.view(batch, length, count, shape.head_dim).transpose(1, 2)

    groups = shape.heads // shape.kv_heads
    query = _rotated(heads("q_proj", shape.heads), tables)
    key, value = _rotated(heads("k_proj", shape.kv_heads), tables), heads("v_proj", shape.kv_heads)
    if past is not None:
        key, value = past.extended(key, value)
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=length > 1)
    return F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), weights[f"{name}.o_proj.weight"])


def _mlp(weights: Weights, name: str, x: Tensor) -> Tensor:
    gate = F.linear(x, weights[f"{name}.gate_proj.weight"])
    up = F.linear(x, weights[f"{name}.up_proj.weight"])
    return F.linear(F.silu(gate) * up, weights[f"{name}.down_proj.weight"])


def next_token_loss(shape: Shape, weights: Weights, windows: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of predicting windows[:, 1:] from windows[:, :-1] (batch, length + 1)."""
    return prediction_loss(shape, weights, windows[:, :-1], windows[:, 1:])


def prediction_loss(shape: Shape, weights: Weights, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of the targets (batch, length); a target of -100 does not count."""
    states = hidden_states(shape, weights, inputs)
    logits = F.linear(states.flatten(0, 1), weights["model.embed_tokens.weight"])
    return F.cross_entropy(logits, targets.flatten())


def loss_and_gradients(shape: Shape, weights: Weights, inputs: Tensor, targets: Tensor, rows_per_pass: int) -> float:
    """Accumulate into `.grad` the gradient of the mean loss over all rows, a few rows at a time; return the loss."""
    total = 0.0
    for some, theirs in zip(torch.split(inputs, rows_per_pass), torch.split(targets, rows_per_pass), strict=True):
        loss = prediction_loss(shape, weights, some, theirs) * (len(some) / len(inputs))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total
