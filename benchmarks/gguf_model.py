"""Owns the model of the benchmarks as a GGUF file, for peers that read nothing else: the same weights, in float32 or bfloat16.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian. No vocabulary: peers get token ids.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.engine_driver import Dtype
from benchmarks.random_model import LLAMA_100M, LlamaShape

ALIGNMENT = 32
UINT32, FLOAT32, STRING = 4, 6, 8  # types of metadata
TENSOR_TYPES = {torch.float32: 0, torch.bfloat16: 30}
FILE_TYPES: dict[Dtype, int] = {"float32": 0, "bfloat16": 32}

ROOT_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_gguf(model_dir: Path, path: Path, dtype: Dtype, shape: LlamaShape = LLAMA_100M) -> Path:
    """Writes the checkpoint of `write_random_llama` in `model_dir` to `path`; returns it."""
    with safe_open(model_dir / "model.safetensors", framework="pt") as checkpoint:
        tensors = {
            name: _converted(name, checkpoint.get_tensor(source), dtype, shape) for name, source in _names(shape)
        }
    metadata = list(_metadata(dtype, shape))
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + b"".join(metadata)
    offset = 0
    for name, tensor in tensors.items():
        head += (
            _text(name) + struct.pack("<I", tensor.dim()) + struct.pack(f"<{tensor.dim()}Q", *reversed(tensor.shape))
        )
        head += struct.pack("<IQ", TENSOR_TYPES[tensor.dtype], offset)
        offset += _aligned(tensor.nbytes)
    with path.open("wb") as file:
        file.write(head.ljust(_aligned(len(head)), b"\0"))
        for tensor in tensors.values():
            file.write(tensor.view(torch.uint8).numpy().tobytes().ljust(_aligned(tensor.nbytes), b"\0"))
    return path


def _names(shape: LlamaShape) -> Iterator[tuple[str, str]]:
    """Names in GGUF, and those of the checkpoint."""
    yield from ROOT_NAMES.items()
    for layer in range(shape.layers):
        for name, source in LAYER_NAMES.items():
            yield f"blk.{layer}.{name}.weight", f"model.layers.{layer}.{source}.weight"


def _converted(name: str, tensor: torch.Tensor, dtype: Dtype, shape: LlamaShape) -> torch.Tensor:
    if tensor.dim() == 1:
        return tensor.float()  # llama.cpp multiplies norms in float32 only
    if name.endswith(("attn_q.weight", "attn_k.weight")):
        # There the two numbers that a rotation mixes lie beside each other; here half a head apart.
        halves = tensor.view(-1, 2, shape.head_dim // 2, tensor.shape[1])
        tensor = halves.transpose(1, 2).reshape(tensor.shape)
    converted: torch.Tensor = tensor.to(getattr(torch, dtype)).contiguous()
    return converted


def _metadata(dtype: Dtype, shape: LlamaShape) -> Iterator[bytes]:
    yield _entry("general.architecture", "llama")
    yield _entry("general.file_type", FILE_TYPES[dtype])
    yield _entry("tokenizer.ggml.model", "none")
    sizes: dict[str, int | float] = {
        "vocab_size": shape.vocab,
        "context_length": shape.context_tokens,
        "embedding_length": shape.hidden,
        "block_count": shape.layers,
        "feed_forward_length": shape.intermediate,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.layer_norm_rms_epsilon": shape.norm_eps,
        "rope.dimension_count": shape.head_dim,
        "rope.freq_base": shape.rope_theta,
    }
    for name, size in sizes.items():
        yield _entry(f"llama.{name}", size)


def _entry(key: str, value: str | int | float) -> bytes:
    match value:
        case str():
            return _text(key) + struct.pack("<I", STRING) + _text(value)
        case int():
            return _text(key) + struct.pack("<II", UINT32, value)
        case float():
            return _text(key) + struct.pack("<If", FLOAT32, value)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT
