"""Owns how the compute of a token grows with the tokens before it. Pure, torch-free."""

from __future__ import annotations

from engine.model_spec import ModelSpec


def token_growth(spec: ModelSpec) -> float:
    """What each token before a token adds to its compute, as a share of what the first token of a prompt takes.

    In FLOP: 2 per weight of the layers that the token meets, 4 per head dimension and key before it. Layers with a window add nothing
    (it bounds them), the output head nothing (it is computed for the last token alone).
    """
    attention = 4 * spec.heads * spec.head_dim * _growing_layers(spec)
    return attention / (2 * sum(_layer_weights(spec, layer) for layer in range(spec.layers)))


def _growing_layers(spec: ModelSpec) -> int:
    return spec.windows.count(0) if spec.windows else spec.layers


def _layer_weights(spec: ModelSpec, layer: int) -> int:
    projections = 2 * spec.hidden * (spec.heads + spec.kv_heads) * spec.head_dim
    if spec.experts is None or not spec.experts.in_layer(layer):
        return projections + 3 * spec.hidden * spec.intermediate
    experts = spec.experts
    return projections + spec.hidden * (experts.count + 3 * experts.per_token * experts.intermediate)
