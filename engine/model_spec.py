"""Owns the gate of models: reads config.json into a ModelSpec, or refuses by name what would not be computed exactly. Torch-free.

Four families share one decoder: llama, mistral, qwen2, qwen3. Everything that would change a single logit and is not built here
(RoPE scaling, sliding windows in effect, quantised weights, other activations) raises ModelUnsupported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from pdserve.errors import ConfigInvalid, ModelUnsupported

Json = Mapping[str, object]
Family = Literal["llama", "mistral", "qwen2", "qwen3"]

FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3")
_MAX_CONFIG_BYTES = 4 * 2**20
_MAX_COUNT = 1 << 24  # of heads, layers, dimensions: bounds what a hostile config can make us allocate


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything the decoder needs to know of a checkpoint but its weights."""

    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    norm_eps: float
    rope_theta: float
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    context_tokens: int
    eos_token_ids: tuple[int, ...]
    sliding_window: int = 0  # 0 = none; else exact only for contexts of at most this many tokens

    @classmethod
    def load(cls, model_dir: Path) -> ModelSpec:
        """Reads config.json and generation_config.json of `model_dir`. Raises ModelUnsupported, ConfigInvalid."""
        config = _read_json(model_dir / "config.json")
        generation_path = model_dir / "generation_config.json"
        generation = _read_json(generation_path) if generation_path.is_file() else {}
        return cls.of(config, generation)

    @classmethod
    def of(cls, config: Json, generation: Json) -> ModelSpec:
        family = _family(config)
        _refuse_what_is_not_built(config)
        fields = _Fields(config)
        heads = fields.count("num_attention_heads")
        kv_heads = fields.count("num_key_value_heads", default=heads)
        hidden = fields.count("hidden_size")
        head_dim = fields.count("head_dim", default=128 if family == "qwen3" else hidden // heads)
        if heads % kv_heads or head_dim % 2:
            raise ConfigInvalid(f"config.json: {heads} heads, {kv_heads} KV heads of {head_dim} do not fit together.")
        attention_bias = fields.flag("attention_bias") if family in ("llama", "qwen3") else False
        return cls(
            family=family,
            layers=fields.count("num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=fields.count("intermediate_size"),
            vocab=fields.count("vocab_size"),
            norm_eps=fields.positive("rms_norm_eps", default=1e-6),
            rope_theta=_rope_theta(config),
            qkv_bias=attention_bias or family == "qwen2",
            output_bias=attention_bias,
            mlp_bias=fields.flag("mlp_bias") if family == "llama" else False,
            qk_norm=family == "qwen3",
            tied=fields.flag("tie_word_embeddings"),
            context_tokens=fields.count("max_position_embeddings"),
            eos_token_ids=_eos_ids(config, generation),
            sliding_window=_sliding_window(config, family),
        )

    def context_limit(self, asked: int) -> int:
        """Context in tokens for the configured limit `asked` (0 = the model's own)."""
        if asked > self.context_tokens:
            raise ConfigInvalid(
                f"model.max_context_tokens is {asked}, but the model was made for {self.context_tokens} tokens."
            )
        limit = asked or self.context_tokens
        if self.sliding_window and limit > self.sliding_window:
            raise ModelUnsupported(
                f"sliding_window={self.sliding_window} is in effect for a context of {limit} tokens and is not supported. "
                f"Set model.max_context_tokens to {self.sliding_window} or less."
            )
        return limit

    def rope_identity(self) -> str:
        """RoPE as a field of the KV identity."""
        return f"default theta={self.rope_theta!r} dim={self.head_dim}"


class _Fields:
    """Typed and bounded access to config.json."""

    def __init__(self, config: Json) -> None:
        self._config = config

    def count(self, name: str, default: int | None = None) -> int:
        value = self._config.get(name)
        if value is None and default is not None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_COUNT:
            raise ConfigInvalid(f"config.json: {name} must be a whole number from 1 to {_MAX_COUNT}, not {value!r}.")
        return value

    def positive(self, name: str, default: float) -> float:
        return _positive(self._config.get(name, default), name)

    def flag(self, name: str) -> bool:
        value = self._config.get(name, False)
        if not isinstance(value, bool):
            raise ConfigInvalid(f"config.json: {name} must be true or false, not {value!r}.")
        return value


def _read_json(path: Path) -> Json:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ConfigInvalid(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes.")
        parsed: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigInvalid(f"{path} does not exist: a model is a directory of the Hugging Face format.") from None
    except (OSError, ValueError) as error:
        raise ConfigInvalid(f"{path} cannot be read: {error}.") from error
    if not isinstance(parsed, dict):
        raise ConfigInvalid(f"{path} must hold a JSON object.")
    return cast(Json, parsed)


def _family(config: Json) -> Family:
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type == family:
            return family
    raise ModelUnsupported(f"model_type {model_type!r} is not supported. Supported: {', '.join(FAMILIES)}.")


def _refuse_what_is_not_built(config: Json) -> None:
    if config.get("quantization_config") is not None or config.get("compression_config") is not None:
        raise ModelUnsupported("quantization_config: quantised checkpoints are not supported. Use float weights.")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelUnsupported(f"hidden_act {config['hidden_act']!r} is not supported, only 'silu'.")
    if config.get("partial_rotary_factor", 1.0) not in (1, 1.0, None):
        raise ModelUnsupported(f"partial_rotary_factor {config['partial_rotary_factor']!r} is not supported.")
    if config.get("auto_map") is not None:
        raise ModelUnsupported("auto_map: models that bring code of their own are not supported.")


def _rope_theta(config: Json) -> float:
    """`rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (older). Only plain RoPE passes."""
    theta = config.get("rope_theta", 10_000.0)
    for name in ("rope_parameters", "rope_scaling"):
        section = config.get(name)
        if section is None:
            continue
        if not isinstance(section, Mapping):
            raise ConfigInvalid(f"config.json: {name} must be an object, not {section!r}.")
        kind = section.get("rope_type", section.get("type", "default"))
        if kind != "default":
            raise ModelUnsupported(f"{name}: RoPE of type {kind!r} is not supported, only 'default'.")
        if section.get("partial_rotary_factor", 1.0) != 1.0:
            raise ModelUnsupported(f"{name}: partial_rotary_factor is not supported.")
        theta = section.get("rope_theta", theta)
    return _positive(theta, "rope_theta")


def _positive(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigInvalid(f"config.json: {name} must be a positive number, not {value!r}.")
    return float(value)


def _sliding_window(config: Json, family: Family) -> int:
    """Size of the window if one may be in effect; `ModelSpec.context_limit` decides by the context."""
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise ModelUnsupported(f"layer_types {sorted(set(map(str, kinds)))} are not supported.")
    if family == "llama":
        return 0
    window = config.get("sliding_window", 4096 if family == "mistral" else None)
    if window is None or (family != "mistral" and not config.get("use_sliding_window", False)):
        return 0
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ConfigInvalid(f"config.json: sliding_window must be a whole number or null, not {window!r}.")
    return window


def _eos_ids(config: Json, generation: Json) -> tuple[int, ...]:
    """End tokens: generation_config.json decides where it names some, as transformers' generate does."""
    for source in (generation, config):
        value = source.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            raise ConfigInvalid(f"eos_token_id must be a token id or a list of them, not {value!r}.")
        return tuple(dict.fromkeys(ids))
    return ()
