"""The gate of models: what is refused, by which name; what config.json may look like; checkpoints that are not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, Qwen3MoeConfig, Qwen3MoeModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from engine.checkpoint import Checkpoint
from engine.model_spec import FAMILIES, ModelSpec
from engine.operations import TorchOperations
from engine.rotary import RotaryTable, frequencies
from engine.weights import WeightReader
from pdserve.errors import ConfigInvalid, ModelUnsupported
from tests.engine.rig import EXPERTS, LLAMA3, YARN, families, save_random

BASE: dict[str, object] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


MOE: dict[str, object] = {"model_type": "qwen3_moe", **EXPERTS}


def spec(changes: dict[str, object] | None = None, generation: dict[str, object] | None = None) -> ModelSpec:
    return ModelSpec.of({**BASE, **(changes or {})}, generation or {})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gemma2"}, "gemma2"),
        ({"model_type": None}, "None"),
        ({"model_type": "gpt_oss"}, "gpt_oss"),
        ({"attention_sink_size": 4}, "attention_sink_size"),
        ({"model_type": "qwen3", "add_swa_attention_sink_bias": True}, "add_swa_attention_sink_bias"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "longrope"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differs between layers"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 2}, "linear_attention"),
    ],
)
def test_what_would_not_be_exact_is_refused_by_name(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ModelUnsupported, match=named):
        spec(changes)


def test_a_config_that_says_it_has_no_sinks_is_read() -> None:
    assert spec({"attention_sink_size": 0, "add_full_attention_sink_bias": False}).layers == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 0},
        {"num_hidden_layers": "2"},
        {"hidden_size": 2**30},
        {"vocab_size": True},
        {"num_key_value_heads": 3},
        {"rms_norm_eps": 0},
        {"rope_theta": -1.0},
        {"rope_scaling": "llama3"},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}},
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": "256"}},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "linear", "factor": 0.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
        {"rope_parameters": {**YARN, "truncate": None}},
        {"rope_parameters": {**YARN, "attention_factor": 0}},
        {"rope_parameters": {**YARN, "rope_theta": 1.0}},
        {"rope_parameters": YARN, "rope_scaling": LLAMA3},
        {"tie_word_embeddings": "yes"},
        {"model_type": "qwen3_moe"},
        {**MOE, "num_local_experts": 4},
        {**MOE, "num_experts_per_tok": 9},
        {**MOE, "decoder_sparse_step": 0},
        {**MOE, "mlp_only_layers": ["1"]},
        {**MOE, "mlp_only_layers": 1},
        {**MOE, "norm_topk_prob": 1},
    ],
)
def test_nonsense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigInvalid):
        spec(changes)


def test_every_family_is_told_apart_by_what_is_its_own() -> None:
    read = {family: spec({**EXPERTS, "model_type": family, "sliding_window": None}) for family in FAMILIES}
    assert [read[family].qkv_bias for family in FAMILIES] == [False, False, True, False, False]
    assert [read[family].qk_norm for family in FAMILIES] == [False, False, False, True, True]
    assert [read[family].experts is not None for family in FAMILIES] == [False, False, False, False, True]
    assert [read[family].head_dim for family in FAMILIES] == [8, 8, 8, 128, 8]


@pytest.mark.parametrize(
    "changes", [{}, {"mlp_only_layers": [0, 3, 99]}, {"decoder_sparse_step": 2}, {"mlp_only_layers": None}]
)
def test_experts_are_in_the_layers_where_transformers_has_them(changes: dict[str, object]) -> None:
    config = {**BASE, **MOE, "num_hidden_layers": 5, **changes}
    with torch.device("meta"):
        reference = Qwen3MoeModel(Qwen3MoeConfig.from_dict(config))
    experts = ModelSpec.of(config, {}).experts
    assert experts is not None
    sparse = [isinstance(layer.mlp, Qwen3MoeSparseMoeBlock) for layer in reference.layers]
    assert [experts.in_layer(number) for number in range(5)] == sparse


def test_the_number_of_experts_is_read_in_both_forms() -> None:
    renamed = {name: value for name, value in MOE.items() if name != "num_experts"} | {"num_local_experts": 8}
    assert spec(renamed).experts == spec(MOE).experts


def test_every_choice_about_experts_is_part_of_an_identity() -> None:
    changes: list[dict[str, object]] = [
        {},
        {"num_experts_per_tok": 3},
        {"norm_topk_prob": True},
        {"decoder_sparse_step": 2},
        {"mlp_only_layers": [0, 1]},
    ]
    identities = {spec({**MOE, **change}).mlp_identity() for change in changes} | {spec().mlp_identity()}
    assert len(identities) == 6


def test_rope_is_read_in_both_forms() -> None:
    assert spec({"rope_theta": 5e5, "rope_scaling": None}).rope_theta == 5e5
    assert spec({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}).rope_theta == 1e6


@pytest.mark.parametrize(
    "section",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
        LLAMA3,
        {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
        YARN,
        {**YARN, "truncate": False, "beta_slow": 2, "attention_factor": 1.5},
        {**YARN, "factor": 1.0},
        {**YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.8},
        {**YARN, "beta_fast": 1, "beta_slow": 1, "original_max_position_embeddings": 32768},
    ],
)
def test_frequencies_are_those_of_transformers_to_the_last_bit(section: dict[str, object]) -> None:
    config = LlamaConfig.from_dict({**BASE, "head_dim": 64, "rope_parameters": dict(section)})
    reference = LlamaRotaryEmbedding(config)
    read = spec({"head_dim": 64, "rope_parameters": section})
    assert torch.equal(frequencies(read.rope_theta, 64, read.rope_scaling), reference.inv_freq)
    table = RotaryTable(read.rope_theta, 64, read.rope_scaling, torch.float32, torch.device("cpu"))
    positions = torch.tensor([0, 1, 255, 256, 5000])
    cos, sin = table.rows(positions, 5000).unsqueeze(1).chunk(2, dim=-1)
    expected_cos, expected_sin = reference(torch.zeros(1), positions[None])
    torch.testing.assert_close(cos[:, 0], expected_cos[0, :, :32], atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[:, 0], expected_sin[0, :, :32], atol=1e-6, rtol=0)


def test_the_scaled_llama_of_these_tests_has_all_three_bands() -> None:
    read = spec({"head_dim": 16, "rope_parameters": LLAMA3})
    ratios = frequencies(5e5, 16, None) / frequencies(5e5, 16, read.rope_scaling)
    bands = [(ratios == 1.0).any(), ((ratios > 1.001) & (ratios < 7.999)).any(), (ratios == 8.0).any()]
    assert all(bands)


def test_the_original_context_is_read_where_transformers_reads_it() -> None:
    section = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    changes: dict[str, object] = {"rope_scaling": section}
    for added in ({}, {"original_max_position_embeddings": 64}, {"rope_scaling": LLAMA3}):
        changes.update(added)
        reference = LlamaRotaryEmbedding(LlamaConfig.from_dict({**BASE, **changes}))
        read = spec(changes)
        assert torch.equal(frequencies(read.rope_theta, 8, read.rope_scaling), reference.inv_freq)


def test_every_parameter_of_rope_is_part_of_its_identity() -> None:
    yarn: dict[str, object] = {**YARN, "beta_slow": 1, "attention_factor": 1.2, "truncate": True}
    sections: list[dict[str, object]] = [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}, LLAMA3, yarn]
    for whole in (LLAMA3, yarn):
        for name, value in whole.items():
            if isinstance(value, bool):
                sections.append({**whole, name: not value})
            elif isinstance(value, int | float):
                sections.append({**whole, name: value * 2})
    identities = [spec({"rope_parameters": section}).rope_identity() for section in sections]
    assert len(set(identities)) == len(identities) == 16
    assert identities[0] == "default theta=10000.0 dim=8"


def test_a_context_stretched_by_yarn_may_be_used_whole() -> None:
    assert spec({"rope_scaling": YARN}).context_limit(2048) == 2048
    assert spec({"rope_scaling": {**YARN, "factor": 1e300}}).context_tokens == 2**24
    assert spec({"rope_scaling": LLAMA3}).context_tokens == 128


def test_end_tokens_are_those_of_the_generation_config_where_there_is_one() -> None:
    assert spec({"eos_token_id": 2}).eos_token_ids == (2,)
    assert spec({"eos_token_id": 2}, {"eos_token_id": [7, 9, 7]}).eos_token_ids == (7, 9)
    with pytest.raises(ConfigInvalid):
        spec({"eos_token_id": "end"})


def test_the_window_of_every_layer_is_that_of_transformers() -> None:
    layers = spec({"model_type": "llama"}).layers
    assert spec({"model_type": "mistral", "sliding_window": 64}).windows == (64,) * layers
    assert spec({"model_type": "mistral", "sliding_window": None}).windows == (0,) * layers
    assert spec({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False}).windows == (0,) * layers
    late = {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}
    assert spec(late).windows == (0,) + (4096,) * (layers - 1)
    kinds = ["sliding_attention"] + ["full_attention"] * (layers - 1)
    assert spec({**late, "model_type": "qwen3", "layer_types": kinds}).windows == (4096,) + (0,) * (layers - 1)
    with pytest.raises(ConfigInvalid, match="layer_types"):
        spec({**late, "layer_types": [*kinds, "full_attention"]})
    with pytest.raises(ConfigInvalid, match="sliding_window"):
        spec({"model_type": "mistral", "sliding_window": 0})


def test_a_context_beyond_the_models_own_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match="129"):
        spec().context_limit(129)


def test_a_directory_without_a_usable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="does not exist"):
        ModelSpec.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigInvalid, match="cannot be read"):
        ModelSpec.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigInvalid, match="JSON object"):
        ModelSpec.load(tmp_path)


# ---- checkpoints


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    save_random(families()["llama"], directory)
    return directory


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("experts")
    save_random(families()["qwen3_moe"], directory)
    return directory


def read(directory: Path, spec_of: Path) -> None:
    with Checkpoint(directory) as checkpoint:
        operations = TorchOperations(torch.float32)
        WeightReader(checkpoint, ModelSpec.load(spec_of), operations, torch.float32, torch.device("cpu")).model()


def changed(llama: Path, directory: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """The checkpoint of `llama` with tensors replaced, added or (None) left out."""
    with Checkpoint(llama) as checkpoint:
        handle = checkpoint._handles[0]
        tensors = {name: handle.get_tensor(name) for name in checkpoint.names()}
    tensors.update({name: tensor for name, tensor in changes.items() if tensor is not None})
    save_file(
        {name: t.contiguous() for name, t in tensors.items() if changes.get(name, t) is not None},
        directory / "model.safetensors",
    )
    return directory


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({NORM: None}, f"lacks the tensor '{NORM}'"),
        ({NORM: torch.ones(5)}, "has shape"),
        ({NORM: torch.ones(96, dtype=torch.int8)}, "dtype I8"),
        ({"model.layers.9.extra.weight": torch.ones(3)}, "does not use"),
        ({"model.layers.0.self_attn.sinks": torch.ones(6)}, "self_attn.sinks"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config_is_refused(
    llama: Path, tmp_path: Path, changes: dict[str, torch.Tensor | None], told: str
) -> None:
    with pytest.raises((ConfigInvalid, ModelUnsupported), match=told):
        read(changed(llama, tmp_path, changes), llama)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mlp.experts.7.up_proj.weight": None}, "lacks the tensor"),
        ({"mlp.experts.7.up_proj.weight": torch.ones(63, 96)}, "has shape"),
        ({"mlp.experts.8.up_proj.weight": torch.ones(64, 96)}, "does not use"),
        ({"mlp.shared_expert.up_proj.weight": torch.ones(64, 96)}, "does not use"),
        ({"mlp.gate.e_score_correction_bias": torch.ones(8)}, "does not use"),
    ],
)
def test_a_checkpoint_with_other_experts_than_its_config_names_is_refused(
    experts: Path, tmp_path: Path, changes: dict[str, torch.Tensor | None], told: str
) -> None:
    whole = {f"model.layers.2.{name}": tensor for name, tensor in changes.items()}
    with pytest.raises((ConfigInvalid, ModelUnsupported), match=told):
        read(changed(experts, tmp_path, whole), experts)


def test_a_truncated_file_is_refused(llama: Path, tmp_path: Path) -> None:
    whole = (llama / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigInvalid, match="not a whole safetensors file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "weights.bin", "absent.safetensors"]
)
def test_an_index_names_only_files_beside_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ConfigInvalid):
        Checkpoint(tmp_path)


def test_pickled_weights_are_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ConfigInvalid, match="only safetensors"):
        Checkpoint(tmp_path)


def test_the_digest_depends_on_every_byte_and_on_nothing_else(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    assert Checkpoint(tmp_path).digest() == Checkpoint(llama).digest()
    flipped = bytearray((llama / "model.safetensors").read_bytes())
    flipped[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(flipped)
    assert Checkpoint(tmp_path).digest() != Checkpoint(llama).digest()
