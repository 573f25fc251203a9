"""Owns the bytes of the KV pool: a memfd in the arena's layout that the io process maps too, and on CUDA the pool beside it.

On the CPU the engine computes straight in the arena. On CUDA the pool lies on the device: `publish` copies finished blocks into
the arena before they are announced, `absorb` copies received ones out of it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Protocol

import torch

from engine.block_tables import BlockCopy
from engine.protocol import Layout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8_e4m3": torch.float8_e4m3fn}


class KvMemory(Protocol):
    """Both devices behave alike. Contract: tests/engine/test_kv_memory.py."""

    @property
    def pool(self) -> torch.Tensor:
        """[layer, block, k or v, page token, kv_head, dim], on the compute device."""

    @property
    def fd(self) -> int:
        """The arena's file descriptor."""

    def publish(self, layer: int, blocks: Sequence[int]) -> None:
        """`blocks` of `layer` are final: the arena holds them when this returns."""

    def absorb(self, blocks: Sequence[int]) -> None:
        """The arena holds `blocks` in every layer: the pool holds them when this returns."""

    def close(self) -> None: ...


def open_kv_memory(layout: Layout, device: torch.device) -> KvMemory:
    arena = _Arena(layout)
    return HostKvMemory(arena) if device.type == "cpu" else DeviceKvMemory(arena, device)


def copy_blocks(pool: torch.Tensor, copies: Sequence[BlockCopy]) -> None:
    """Copies whole blocks inside the pool, in every layer."""
    for copy in copies:
        pool[:, copy.target] = pool[:, copy.source]


class HostKvMemory:
    """CPU: pool and arena are the same bytes."""

    def __init__(self, arena: _Arena) -> None:
        self._arena = arena
        self.pool = arena.tensor

    @property
    def fd(self) -> int:
        return self._arena.fd

    def publish(self, layer: int, blocks: Sequence[int]) -> None:
        pass  # computed in place

    def absorb(self, blocks: Sequence[int]) -> None:
        pass  # received in place

    def close(self) -> None:
        self._arena.close()


class DeviceKvMemory:
    """CUDA: blocks are copied between pool and arena, and the copy has ended when the call returns."""

    def __init__(self, arena: _Arena, device: torch.device) -> None:
        self._arena = arena
        self.pool = torch.zeros_like(arena.tensor, device=device)

    @property
    def fd(self) -> int:
        return self._arena.fd

    def publish(self, layer: int, blocks: Sequence[int]) -> None:
        ids = torch.tensor(blocks)
        self._arena.tensor[layer][ids] = self.pool[layer][ids.to(self.pool.device)].cpu()

    def absorb(self, blocks: Sequence[int]) -> None:
        ids = torch.tensor(blocks)
        self.pool[:, ids.to(self.pool.device)] = self._arena.tensor[:, ids].to(self.pool.device)

    def close(self) -> None:
        self._arena.close()


class _Arena:
    """The memfd, mapped as a tensor. Its pages are touched at once: a fresh page costs more than the copy into it."""

    def __init__(self, layout: Layout) -> None:
        dtype = TORCH_DTYPES[layout.dtype]
        size_bytes = layout.layers * layout.blocks * layout.block_bytes
        self.fd = os.memfd_create("pdserve-kv", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size_bytes)
        self._map = mmap.mmap(self.fd, size_bytes)
        shape = (layout.layers, layout.blocks, 2, layout.page_tokens, layout.kv_heads, layout.head_dim)
        self.tensor = torch.frombuffer(self._map, dtype=dtype).view(shape)
        self.tensor.zero_()

    def close(self) -> None:
        os.close(self.fd)  # the mapping goes with the last tensor over it
