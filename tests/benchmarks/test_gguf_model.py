"""The GGUF file holds the checkpoint's own weights: read back by a reader of the format that shares nothing with its writer."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.engine_driver import Dtype
from benchmarks.gguf_model import write_gguf
from benchmarks.random_model import LlamaShape, write_random_llama

SHAPE = LlamaShape(layers=2, hidden=48, heads=3, kv_heads=1, head_dim=16, intermediate=80, vocab=101, context_tokens=64)
SCALARS = {4: "<I", 6: "<f"}
TYPES = {0: torch.float32, 30: torch.bfloat16}


@dataclass(slots=True)
class Reader:
    data: bytes
    at: int = 0

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        assert isinstance(value, int)
        return value

    def text(self) -> str:
        size = self.number("<Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self) -> object:
        kind = self.number("<I")
        if kind == 8:
            return self.text()
        (value,) = struct.unpack_from(SCALARS[kind], self.data, self.at)
        self.at += 4
        found: object = value
        return found


def read_gguf(path: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    reader = Reader(path.read_bytes(), 4)
    assert reader.data[:4] == b"GGUF"
    assert reader.number("<I") == 3
    tensor_count, value_count = reader.number("<Q"), reader.number("<Q")
    metadata = {reader.text(): reader.value() for _ in range(value_count)}
    rows = []
    for _ in range(tensor_count):
        name = reader.text()
        shape = [reader.number("<Q") for _ in range(reader.number("<I"))][::-1]
        rows.append((name, shape, TYPES[reader.number("<I")], reader.number("<Q")))
    start = -(-reader.at // 32) * 32
    tensors = {}
    for name, shape, dtype, offset in rows:
        assert offset % 32 == 0
        count = torch.Size(shape).numel()
        tensors[name] = torch.frombuffer(bytearray(reader.data), dtype=dtype, count=count, offset=start + offset)
        tensors[name] = tensors[name].view(shape)
    return metadata, tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_weight_is_the_checkpoints_in_the_type_asked_for(tmp_path: Path, dtype: Dtype) -> None:
    write_random_llama(tmp_path, SHAPE)
    metadata, tensors = read_gguf(write_gguf(tmp_path, tmp_path / "model.gguf", dtype, SHAPE))
    weights = load_file(tmp_path / "model.safetensors")
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.attention.head_count_kv"] == 1
    assert len(tensors) == len(weights) == 2 + 9 * SHAPE.layers
    stored = getattr(torch, dtype)
    assert torch.equal(tensors["token_embd.weight"], weights["model.embed_tokens.weight"].to(stored))
    assert torch.equal(tensors["blk.1.ffn_down.weight"], weights["model.layers.1.mlp.down_proj.weight"].to(stored))
    assert tensors["blk.0.attn_norm.weight"].dtype == torch.float32


def test_the_two_numbers_of_a_rotation_lie_beside_each_other(tmp_path: Path) -> None:
    write_random_llama(tmp_path, SHAPE)
    _, tensors = read_gguf(write_gguf(tmp_path, tmp_path / "model.gguf", "float32", SHAPE))
    queries = load_file(tmp_path / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    turned = tensors["blk.0.attn_q.weight"]
    for head in range(SHAPE.heads):
        for pair in range(SHAPE.head_dim // 2):
            row = head * SHAPE.head_dim
            assert torch.equal(turned[row + 2 * pair], queries[row + pair])
            assert torch.equal(turned[row + 2 * pair + 1], queries[row + pair + SHAPE.head_dim // 2])
