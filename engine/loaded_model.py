"""Owns the loading of a model: config to checkpoint, device, dtype, threads, weights, the layout and size of its KV pool."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoint import Checkpoint
from engine.decoder import Decoder
from engine.kernels.build import ROUNDING
from engine.kernels.library import Kernels, built_sets, load_kernels
from engine.kv_memory import TORCH_DTYPES, KvMemory, open_kv_memory
from engine.model_spec import ModelSpec
from engine.operations import KernelOperations, TorchOperations
from engine.pool_size import pool_bytes
from engine.protocol import Layout
from engine.weights import WeightReader
from kv_transfer.keys import identity_digest
from pdserve.errors import ConfigInvalid
from service_kit.config import EngineConfig, ModelConfig
from service_kit.hub_model import model_directory
from service_kit.logs import get_logger

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    name: str
    spec: ModelSpec
    decoder: Decoder
    device: torch.device
    layout: Layout
    identity: bytes
    max_context_tokens: int
    load_seconds: float
    kernels: Kernels | None  # None: torch computes


def load_model(model: ModelConfig, engine: EngineConfig) -> tuple[LoadedModel, KvMemory]:
    """Raises ConfigInvalid or ModelUnsupported, with what to change."""
    start_s = time.monotonic()
    if engine.threads:
        torch.set_num_threads(engine.threads)
    device = _device(model.device)
    dtype_name = model.dtype if model.dtype != "auto" else ("float32" if device.type == "cpu" else "bfloat16")
    directory = model_directory(model.path)
    spec = ModelSpec.load(directory)
    max_context_tokens = spec.context_limit(model.max_context_tokens)
    kv_dtype = dtype_name if engine.kv_dtype == "auto" else engine.kv_dtype
    dtype = TORCH_DTYPES[dtype_name]
    kernels = _kernels(spec, engine, device, dtype)
    operations = TorchOperations(dtype) if kernels is None else KernelOperations(kernels)
    with Checkpoint(directory) as checkpoint:
        weights = WeightReader(checkpoint, spec, operations, dtype, device).model()
        identity = _identity(spec, checkpoint.digest(), dtype_name, kv_dtype)
    decoder = Decoder(spec, weights, operations, device)
    layout = _layout(spec, kv_dtype, engine, pool_bytes(engine, device))
    memory = open_kv_memory(layout, device)
    computes = f"kernels {kernels.instruction_set}" if kernels is not None else f"torch on {device.type}"
    _log.info("model_loaded", computes=computes, threads=torch.get_num_threads(), kv_blocks=layout.blocks)
    loaded = LoadedModel(
        name=model.served_name or Path(model.path).name,
        spec=spec,
        decoder=decoder,
        device=device,
        layout=layout,
        identity=identity,
        max_context_tokens=max_context_tokens,
        load_seconds=time.monotonic() - start_s,
        kernels=kernels,
    )
    return loaded, memory


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigInvalid("model.device is cuda, but torch sees no CUDA device. Set model.device to cpu or auto.")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")


def _kernels(spec: ModelSpec, engine: EngineConfig, device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """None where torch's operators compute: by configuration, on CUDA, or where no built kernel fits machine and model."""
    if engine.kernels == "torch" or (engine.kernels == "auto" and device.type != "cpu"):
        return None
    kernels = load_kernels(engine.kernels, dtype) if device.type == "cpu" else None
    fits = kernels is not None and spec.head_dim % kernels.lanes == 0
    if engine.kernels != "auto" and not fits:
        raise ConfigInvalid(
            f"engine.kernels is {engine.kernels}, but no kernels of that instruction set fit: built and usable here are "
            f"{', '.join(built_sets()).lower() or 'none'}, on the CPU alone ({ROUNDING.lower()} for bfloat16 models), for head "
            f"dimensions that are multiples of 16 (8 with avx2). Here are {device.type}, {dtype} and {spec.head_dim}. Set "
            "engine.kernels to auto or torch, or run make setup on this machine."
        )
    return kernels if fits else None


def _layout(spec: ModelSpec, dtype_name: str, engine: EngineConfig, size_bytes: int) -> Layout:
    block_bytes = 2 * engine.block_tokens * spec.kv_heads * spec.head_dim * TORCH_DTYPES[dtype_name].itemsize
    blocks = size_bytes // (spec.layers * block_bytes)
    if blocks < 2:
        source = "engine.kv_bytes is" if engine.kv_bytes else "free memory beyond engine.memory_reserve leaves"
        raise ConfigInvalid(
            f"{source} {size_bytes} bytes for the KV pool, but one KV block of {engine.block_tokens} tokens takes "
            f"{spec.layers * block_bytes} bytes in all layers. Give at least two blocks."
        )
    return Layout(
        layers=spec.layers,
        blocks=blocks,
        page_tokens=engine.block_tokens,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype_name,
        block_bytes=block_bytes,
    )


def _identity(spec: ModelSpec, weights_digest: str, dtype_name: str, kv_dtype: str) -> bytes:
    """What two engines must share for the KV of one to be that of the other."""
    return identity_digest(
        [
            ("family", spec.family),
            ("weights", weights_digest),
            ("dtype", dtype_name),
            ("kv_dtype", kv_dtype),
            ("heads", f"{spec.heads}/{spec.kv_heads}x{spec.head_dim}"),
            ("mlp", spec.mlp_identity()),
            ("windows", repr(spec.windows)),
            ("norm_eps", repr(spec.norm_eps)),
            ("rope", spec.rope_identity()),
            ("adapter", ""),
        ]
    )
