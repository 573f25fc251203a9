"""Owns the tokenizers that these tests train: byte-level BPE and sentencepiece-like BPE with byte fallback, as HF directories."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "def read(path):\n    return open(path).read()\n",
    "naïve café, 你好, 🙂 and 👩‍👩‍👧",
    "the quick brown fox  jumps",
] * 4
SPECIALS = ["<|end|>", "<|user|>"]
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def byte_level_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("ünspecial added", special=False)])
    return backend


def sentencepiece_backend() -> tokenizers.Tokenizer:
    """Llama 2's shape: Prepend + Replace, byte fallback, Strip of the first space."""
    letters = sorted({char for text in CORPUS for char in text.replace(" ", "▁") if ord(char) < 0x3000})
    vocab = {token: place for place, token in enumerate(["<unk>", *SPECIALS])}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    for token in [*letters, "▁t", "▁th", "▁the"]:
        vocab.setdefault(token, len(vocab))
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", *SPECIALS])
    return backend


def write_model_dir(folder: Path, backend: tokenizers.Tokenizer, *, padding_rows: int = 8) -> Path:
    """What a checkpoint's directory says about text."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    rows = backend.get_vocab_size() + padding_rows
    end = backend.token_to_id("<|end|>")
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows, "eos_token_id": end}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    named = {"eos_token": "<|end|>", "bos_token": {"__type": "AddedToken", "content": "<|user|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, "chat_template": TEMPLATE}))
    return folder
