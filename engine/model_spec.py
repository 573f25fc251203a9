"""Owns the gate of models: reads config.json into a ModelSpec, or refuses by name what would not be computed exactly. Torch-free.

The families share one decoder. Everything that would change a single logit and is not built here (other kinds of RoPE, sliding windows
in effect, quantised weights, other activations) raises ModelUnsupported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from pdserve.errors import ConfigInvalid, ModelUnsupported

Json = Mapping[str, object]
Family = Literal["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"]

FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
_MAX_CONFIG_BYTES = 4 * 2**20
_MAX_COUNT = 1 << 24  # of heads, layers, dimensions: bounds what a hostile config can make us allocate


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every frequency divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between them."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_tokens: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071, section 3): a ramp over the dimensions, cos and sin multiplied by `attention_factor`."""

    factor: float
    original_tokens: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool  # the ends of the ramp are whole dimensions


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """The experts of a layer, and which layers have them; the others have one feed-forward."""

    count: int
    per_token: int
    intermediate: int
    normalised: bool
    every: int  # of so many layers, the last one
    dense_layers: frozenset[int]

    def in_layer(self, layer: int) -> bool:
        return layer not in self.dense_layers and (layer + 1) % self.every == 0


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
    windows: tuple[int, ...] = ()  # per layer: how many positions a token sees, itself included; 0 = all
    rope_scaling: RopeScaling | None = None
    experts: ExpertsSpec | None = None

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
        attention_bias = fields.flag("attention_bias") if family in ("llama", "qwen3", "qwen3_moe") else False
        rope = _rope_section(config)
        rope_theta = _positive(rope.get("rope_theta", config.get("rope_theta", 10_000.0)), "rope_theta")
        rope_scaling = _rope_scaling(config, rope, rope_theta)
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
            rope_theta=rope_theta,
            qkv_bias=attention_bias or family == "qwen2",
            output_bias=attention_bias,
            mlp_bias=fields.flag("mlp_bias") if family == "llama" else False,
            qk_norm=family in ("qwen3", "qwen3_moe"),
            tied=fields.flag("tie_word_embeddings"),
            context_tokens=_context_tokens(fields.count("max_position_embeddings"), rope_scaling),
            eos_token_ids=_eos_ids(config, generation),
            windows=_windows(config, family, fields),
            rope_scaling=rope_scaling,
            experts=_experts(config) if family == "qwen3_moe" else None,
        )

    def context_limit(self, asked: int) -> int:
        """Context in tokens for the configured limit `asked` (0 = the model's own)."""
        if asked > self.context_tokens:
            raise ConfigInvalid(
                f"model.max_context_tokens is {asked}, but the model was made for {self.context_tokens} tokens."
            )
        return asked or self.context_tokens

    def rope_identity(self) -> str:
        """RoPE as a field of the KV identity."""
        return f"{_scaling_identity(self.rope_scaling)} theta={self.rope_theta!r} dim={self.head_dim}"

    def mlp_identity(self) -> str:
        """The choice of experts as a field of the KV identity: nothing in the weights tells it."""
        if self.experts is None:
            return "dense"
        chosen = f"per_token={self.experts.per_token} normalised={self.experts.normalised}"
        return f"experts {chosen} every={self.experts.every} dense={sorted(self.experts.dense_layers)}"


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
    for name, value in config.items():
        if "sink" in name and value:  # as a family with sinks names them; gpt_oss does not, and is refused as a family
            raise ModelUnsupported(f"{name} {value!r}: attention sinks are not supported.")


def _rope_section(config: Json) -> Json:
    """`rope_scaling` (older files) or `rope_parameters` (transformers 5), one of them; empty where there is none."""
    found: list[Json] = []
    for name in ("rope_scaling", "rope_parameters"):
        section = config.get(name)
        if section is None:
            continue
        if not isinstance(section, Mapping):
            raise ConfigInvalid(f"config.json: {name} must be an object, not {section!r}.")
        if any(isinstance(value, Mapping) for value in section.values()):
            raise ModelUnsupported(f"{name}: RoPE that differs between layers is not supported.")
        if section.get("partial_rotary_factor", 1.0) not in (1, 1.0, None):
            raise ModelUnsupported(f"{name}: partial_rotary_factor is not supported.")
        if section:
            found.append(section)
    if len(found) == 2 and found[0] != found[1]:
        raise ConfigInvalid("config.json: rope_scaling and rope_parameters disagree. Remove one of them.")
    return found[0] if found else {}


def _rope_scaling(config: Json, section: Json, theta: float) -> RopeScaling | None:
    kind = section.get("rope_type", section.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise ModelUnsupported(
            f"RoPE of type {kind!r} is not supported, only 'default', 'linear', 'llama3' and 'yarn'."
        )
    factor = _positive(section.get("factor"), "factor of RoPE")
    if kind == "linear":
        return LinearScaling(factor)
    # The order of precedence is transformers': what stands at the top level of the file wins.
    places: tuple[tuple[Json, str], ...] = (
        (config, "original_max_position_embeddings"),
        (section, "original_max_position_embeddings"),
        (config, "max_position_embeddings"),
    )
    source, name = next((place for place in places if place[0].get(place[1]) is not None), places[-1])
    original_tokens = _Fields(source).count(name)
    if kind == "yarn":
        return _yarn(section, factor, original_tokens, theta)
    low, high = (_positive(section.get(name), name) for name in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise ConfigInvalid(f"config.json: low_freq_factor {low} must be less than high_freq_factor {high}.")
    return Llama3Scaling(factor, low, high, original_tokens)


def _yarn(section: Json, factor: float, original_tokens: int, theta: float) -> YarnScaling:
    if theta <= 1:
        raise ConfigInvalid(f"config.json: RoPE of type 'yarn' needs a rope_theta above 1, not {theta}.")
    return YarnScaling(
        factor=factor,
        original_tokens=original_tokens,
        beta_fast=_positive(section.get("beta_fast") or 32, "beta_fast"),
        beta_slow=_positive(section.get("beta_slow") or 1, "beta_slow"),
        attention_factor=_attention_factor(section, factor),
        truncate=_Fields({"truncate": True, **section}).flag("truncate"),
    )


def _attention_factor(section: Json, factor: float) -> float:
    """What the file says, or what follows from the scaling factor (YaRN, section 3.4; mscale as DeepSeek has it)."""
    given = section.get("attention_factor")
    if given is not None:
        return _positive(given, "attention_factor")

    def magnitude(scale: object) -> float:
        return 0.1 * _positive(scale, "mscale") * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all_dim = section.get("mscale"), section.get("mscale_all_dim")
    return magnitude(mscale) / magnitude(mscale_all_dim) if mscale and mscale_all_dim else magnitude(1.0)


def _context_tokens(positions: int, scaling: RopeScaling | None) -> int:
    """Files with YaRN often leave max_position_embeddings at what it was before the stretch."""
    if not isinstance(scaling, YarnScaling):
        return positions
    return max(positions, int(min(scaling.factor * scaling.original_tokens, _MAX_COUNT)))


def _scaling_identity(scaling: RopeScaling | None) -> str:
    match scaling:
        case None:
            return "default"
        case LinearScaling(factor):
            return f"linear factor={factor!r}"
        case Llama3Scaling(factor, low, high, original):
            return f"llama3 factor={factor!r} low={low!r} high={high!r} original={original}"
        case YarnScaling(factor, original, fast, slow, attention, truncate):
            ends = f"beta={fast!r}/{slow!r} truncate={truncate}"
            return f"yarn factor={factor!r} original={original} {ends} attention={attention!r}"


def _positive(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigInvalid(f"config.json: {name} must be a positive number, not {value!r}.")
    return float(value)


def _windows(config: Json, family: Family, fields: _Fields) -> tuple[int, ...]:
    """Window of each layer, as transformers builds the masks of each family."""
    layers = fields.count("num_hidden_layers")
    none = (0,) * layers
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise ModelUnsupported(f"layer_types {sorted(set(map(str, kinds)))} are not supported.")
    if family == "llama" or (family != "mistral" and not config.get("use_sliding_window", False)):
        return none
    window = config.get("sliding_window", 4096)  # the default of every family that has windows
    if window is None:
        return none
    if isinstance(window, bool) or not isinstance(window, int) or not 0 < window <= _MAX_COUNT:
        raise ConfigInvalid(f"config.json: sliding_window must be a whole number or null, not {window!r}.")
    if family in ("mistral", "qwen3_moe"):
        return (window,) * layers
    if isinstance(kinds, list):
        if len(kinds) != layers:
            raise ConfigInvalid(f"config.json: layer_types names {len(kinds)} layers, num_hidden_layers is {layers}.")
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    full_layers = fields.count("max_window_layers", default=28)
    return tuple(window if layer >= full_layers else 0 for layer in range(layers))


def _experts(config: Json) -> ExpertsSpec:
    fields = _Fields(config)
    # transformers 5 writes num_local_experts, everything before it num_experts
    count = fields.count("num_experts" if config.get("num_experts") is not None else "num_local_experts")
    if config.get("num_local_experts") not in (None, count):
        raise ConfigInvalid("config.json: num_experts and num_local_experts disagree. Remove one of them.")
    per_token = fields.count("num_experts_per_tok")
    if per_token > count:
        raise ConfigInvalid(f"config.json: num_experts_per_tok is {per_token}, but there are {count} experts.")
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in dense):
        raise ConfigInvalid(f"config.json: mlp_only_layers must be a list of layer numbers, not {dense!r}.")
    return ExpertsSpec(
        count=count,
        per_token=per_token,
        intermediate=fields.count("moe_intermediate_size"),
        normalised=fields.flag("norm_topk_prob"),
        every=fields.count("decoder_sparse_step", default=1),
        dense_layers=frozenset(dense),
    )


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
