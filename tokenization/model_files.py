"""Owns which fields of a checkpoint's JSON files matter to text: special tokens, end-of-sequence ids, chat template."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from pdserve.errors import ModelUnsupported

T = TypeVar("T")


class AddedToken(msgspec.Struct):
    content: str
    special: bool = False
    id: int = -1


class GeneralConfig(msgspec.Struct):
    """config.json and generation_config.json."""

    eos_token_id: int | list[int] | None = None
    vocab_size: int = 0


class NamedTemplate(msgspec.Struct):
    name: str
    template: str


class TokenizerConfig(msgspec.Struct):
    """tokenizer_config.json and special_tokens_map.json."""

    bos_token: str | AddedToken | None = None
    eos_token: str | AddedToken | None = None
    pad_token: str | AddedToken | None = None
    unk_token: str | AddedToken | None = None
    chat_template: str | list[NamedTemplate] | None = None

    def special_tokens(self) -> dict[str, str]:
        """Variable name of the chat template -> text of the token."""
        named = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "unk_token": self.unk_token,
        }
        return {name: token if isinstance(token, str) else token.content for name, token in named.items() if token}


def read_json(path: Path, shape: type[T]) -> T | None:
    """The file as `shape` (unknown fields ignored); None where there is no such file."""
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=shape)
    except msgspec.MsgspecError as error:
        raise ModelUnsupported(f"{path} cannot be read: {error}. Check the checkpoint.") from error


def read_tokenizer_config(model_dir: Path) -> TokenizerConfig:
    return read_json(model_dir / "tokenizer_config.json", TokenizerConfig) or TokenizerConfig()


def read_special_tokens(model_dir: Path) -> dict[str, str]:
    """Of tokenizer_config.json, completed by special_tokens_map.json where older checkpoints keep them."""
    older = read_json(model_dir / "special_tokens_map.json", TokenizerConfig) or TokenizerConfig()
    return older.special_tokens() | read_tokenizer_config(model_dir).special_tokens()
