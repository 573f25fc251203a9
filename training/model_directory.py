"""The Hugging Face directory of the model: configuration, tokenizer files and bfloat16 weights."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from training.network import Shape, Weights
from training.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, END_OF_TURN, SPECIAL_TOKENS, token_id

Json = str | int | float | bool | None | list["Json"] | Mapping[str, "Json"]


def rounded(weights: Weights) -> Weights:
    """Return the weights in bfloat16, as they are stored."""
    return {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in weights.items()}


def write_model_directory(directory: Path, shape: Shape, tokenizer: Tokenizer, weights: Weights) -> None:
    """Write every file but the model card; `weights` carry Hugging Face names and are stored in their dtype."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # safetensors creates it for its owner only
    _write_json(directory / "config.json", model_config(shape, tokenizer))
    _write_json(directory / "generation_config.json", generation_config(tokenizer))
    _write_json(directory / "tokenizer_config.json", tokenizer_config(shape, tokenizer))
    _write_json(directory / "special_tokens_map.json", _named_tokens())


def _write_json(path: Path, value: Mapping[str, Json]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _special_tokens(tokenizer: Tokenizer) -> list[str]:
    return [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is not None]


def _end_tokens(tokenizer: Tokenizer) -> list[Json]:
    """Only a tokenizer that knows turns can end one."""
    return [token_id(tokenizer, token) for token in _special_tokens(tokenizer) if token in (END_OF_TEXT, END_OF_TURN)]


def model_config(shape: Shape, tokenizer: Tokenizer) -> dict[str, Json]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": token_id(tokenizer, END_OF_TEXT),
        "eos_token_id": _end_tokens(tokenizer),
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": token_id(tokenizer, END_OF_TEXT),
        "pretraining_tp": 1,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Json]:
    return {
        "bos_token_id": token_id(tokenizer, END_OF_TEXT),
        "do_sample": False,
        "eos_token_id": _end_tokens(tokenizer),
        "pad_token_id": token_id(tokenizer, END_OF_TEXT),
    }


def tokenizer_config(shape: Shape, tokenizer: Tokenizer) -> dict[str, Json]:
    """A tokenizer without the tokens of turns gets no chat template."""
    specials = _special_tokens(tokenizer)
    chat: dict[str, Json] = {"chat_template": CHAT_TEMPLATE} if END_OF_TURN in specials else {}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": list(specials[1:]),
        **chat,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_positions,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **_named_tokens(),
    }


def _named_tokens() -> dict[str, Json]:
    return {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
