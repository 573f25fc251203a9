"""Owns reading of the served model's description: name, context limit, tokenizer, chat template. No weights, no torch."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from controller.operations import ModelInfo
from pdserve.errors import ConfigInvalid, ModelUnsupported
from service_kit.config import ModelConfig
from tokenization.chat_template import ChatTemplate
from tokenization.model_files import read_json
from tokenization.tokenizer import Tokenizer


class _ContextConfig(msgspec.Struct):
    """The part of config.json that the tokenizer does not read."""

    max_position_embeddings: int = 0


def load_model_info(config: ModelConfig) -> ModelInfo:
    """Raises ConfigInvalid where `model.path` is no directory, ModelUnsupported for what cannot be served."""
    model_dir = Path(config.path)
    if not model_dir.is_dir():
        raise ConfigInvalid(
            f"model.path = {config.path}: is no directory. `pdserve up --model` fetches checkpoints of the hub first."
        )
    context = read_json(model_dir / "config.json", _ContextConfig)
    if context is None or context.max_position_embeddings < 1:
        raise ModelUnsupported(f"{model_dir / 'config.json'} does not say max_position_embeddings.")
    return ModelInfo(
        name=served_name(config),
        created_unix_s=int(time.time()),
        max_context_tokens=min(
            config.max_context_tokens or context.max_position_embeddings, context.max_position_embeddings
        ),
        tokenizer=Tokenizer.load(model_dir),
        chat_template=ChatTemplate.load(model_dir),
    )


def served_name(config: ModelConfig) -> str:
    return config.served_name or Path(config.path).resolve().name
