"""Owns the tokenizer of one checkpoint: text to ids and back, special tokens, end-of-sequence ids."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from pathlib import Path

import msgspec
import tokenizers

from pdserve.errors import InvalidRequest, ModelUnsupported
from tokenization.model_files import AddedToken, GeneralConfig, read_json, read_special_tokens
from tokenization.pieces import DecoderSpec, PieceRule, piece_rule


class TokenizerFile(msgspec.Struct):
    """The parts of tokenizer.json that the `tokenizers` library does not tell."""

    decoder: DecoderSpec | None = None
    added_tokens: list[AddedToken] = []


def ids_to_bytes(ids: Sequence[int]) -> bytes:
    """Token ids as they travel: int32[n], little-endian."""
    packed = array("i", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def ids_from_bytes(data: bytes) -> list[int]:
    packed = array("i", data)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


class Tokenizer:
    """Thread-safe after loading. `encode` releases the interpreter lock, so it belongs in a thread pool."""

    def __init__(self, backend: tokenizers.Tokenizer, rule: PieceRule, special_ids: frozenset[int]) -> None:
        vocab = backend.get_vocab(with_added_tokens=True)
        pieces = [b""] * (max(vocab.values(), default=-1) + 1)
        for token, token_id in vocab.items():
            pieces[token_id] = rule.to_bytes(token)
        self._backend = backend
        self._leading_spaces = rule.leading_spaces
        self._all_pieces = tuple(pieces)
        self.text_pieces = tuple(b"" if place in special_ids else piece for place, piece in enumerate(pieces))
        self.vocab_size = len(pieces)
        self.eos_token_ids: tuple[int, ...] = ()
        self.special_ids = special_ids
        self.special_tokens: dict[str, str] = {}

    @classmethod
    def load(cls, model_dir: Path) -> Tokenizer:
        """Raises ModelUnsupported where tokenizer.json is missing or decodes in a way that cannot be streamed."""
        path = model_dir / "tokenizer.json"
        spec = read_json(path, TokenizerFile)
        if spec is None:
            raise ModelUnsupported(f"{path} is missing. Convert the tokenizer to tokenizer.json (a `fast` tokenizer).")
        backend = tokenizers.Tokenizer.from_file(str(path))
        # tokenizer.json may carry the truncation of its training run, which would cut prompts without a word.
        backend.no_truncation()
        backend.no_padding()
        named = read_special_tokens(model_dir)
        known = [text for text in dict.fromkeys(named.values()) if backend.token_to_id(text) is not None]
        backend.add_special_tokens(known)
        special = [token.content for token in spec.added_tokens if token.special] + known
        special_ids = frozenset(place for text in special if (place := backend.token_to_id(text)) is not None)
        tokenizer = cls(backend, piece_rule(spec.decoder), special_ids)
        tokenizer.special_tokens = named
        tokenizer.eos_token_ids = tokenizer._find_eos(model_dir)
        tokenizer._fit_to_model(model_dir)
        return tokenizer

    def encode(self, text: str, *, add_special_tokens: bool) -> bytes:
        """int32[n] little-endian. `add_special_tokens` = as the checkpoint's post-processor does (often a BOS)."""
        try:
            return ids_to_bytes(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:  # lone surrogates
            raise InvalidRequest("The text is not valid Unicode: it holds lone surrogates.") from error

    def offsets(self, text: str, *, add_special_tokens: bool) -> list[tuple[int, int]]:
        """Per token that `encode` gives, the characters [start, end) of `text` it stands for; empty where it was added."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).offsets)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; equal to the fold of `Detokenizer`, less the spaces that sentencepiece puts first."""
        self.check_ids(ids)
        pieces = self.text_pieces if skip_special_tokens else self._all_pieces
        text = b"".join([pieces[token] for token in ids]).decode("utf-8", "replace")
        leading = len(text) - len(text.lstrip(" "))
        return text[min(leading, self._leading_spaces) :]

    def token_bytes(self, token_id: int) -> bytes:
        return self._all_pieces[token_id]

    def token_text(self, token_id: int) -> str:
        """The token alone; part of a character becomes U+FFFD (`token_bytes` has the truth)."""
        return self._all_pieces[token_id].decode("utf-8", "replace")

    def check_ids(self, ids: Sequence[int], *, param: str = "tokens") -> None:
        """Raises InvalidRequest if an id is outside the vocabulary."""
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            wrong = next(token for token in ids if not 0 <= token < self.vocab_size)
            raise InvalidRequest(
                f"Token id {wrong} is outside the vocabulary: ids go from 0 to {self.vocab_size - 1}.", param=param
            )

    def _find_eos(self, model_dir: Path) -> tuple[int, ...]:
        ids: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            config = read_json(model_dir / name, GeneralConfig)
            if config is not None and config.eos_token_id is not None:
                ids.update([config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id)
                break
        own = self._backend.token_to_id(self.special_tokens.get("eos_token", ""))
        return tuple(sorted(ids | ({own} if own is not None else set())))

    def _fit_to_model(self, model_dir: Path) -> None:
        """The model's embedding may have more rows than the tokenizer has ids (padding), never fewer."""
        config = read_json(model_dir / "config.json", GeneralConfig)
        if config is None or not config.vocab_size:
            return
        if config.vocab_size < self.vocab_size:
            raise ModelUnsupported(
                f"The tokenizer has {self.vocab_size} ids but the model only {config.vocab_size}. "
                "The tokenizer belongs to another checkpoint."
            )
        padding = (b"",) * (config.vocab_size - self.vocab_size)
        self._all_pieces += padding
        self.text_pieces += padding
        self.vocab_size = config.vocab_size
