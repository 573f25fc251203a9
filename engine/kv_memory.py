"""Owns the bytes of the KV pool: a memfd in the arena's layout that the io process maps too, and on CUDA the pool beside it.

On the CPU the engine computes straight in the arena. On CUDA the pool lies on the device: `publish` begins to copy finished
blocks into the arena, beside the compute, and announces them when they are there; `absorb` copies received ones out of it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from engine.block_tables import BlockCopy
from engine.cuda_export import Copy, CopyLane, CudaLane, Exports, runs
from engine.pinned_memory import PinnedMemory, cuda_pinned
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

    @property
    def pinned_bytes(self) -> int:
        """Of the arena, registered with the driver; 0 where no device copies."""

    def publish(self, layer: int, blocks: Sequence[int], announce: Callable[[], None]) -> None:
        """`blocks` of `layer` are final. `announce` is called once the arena holds them, in the order of publication: now, in a
        later `publish` or `look`, or in `settle`."""

    def look(self) -> None:
        """Announces what the arena holds by now; waits for nothing."""

    def settle(self) -> None:
        """Everything published is in the arena and announced when this returns. Published blocks may be freed only after it."""

    def absorb(self, blocks: Sequence[int]) -> None:
        """The arena holds `blocks` in every layer: the pool holds them when this returns."""

    def close(self) -> None: ...


def open_kv_memory(layout: Layout, device: torch.device) -> KvMemory:
    return kv_memory_over(Arena(layout), device)


def kv_memory_over(arena: Arena, device: torch.device) -> KvMemory:
    if device.type == "cpu":
        return HostKvMemory(arena)
    return DeviceKvMemory(arena, device, CudaLane(device), CudaLane(device), cuda_pinned(arena.tensor, device))


def copy_blocks(pool: torch.Tensor, copies: Sequence[BlockCopy]) -> None:
    """Copies whole blocks inside the pool, in every layer."""
    for copy in copies:
        pool[:, copy.target] = pool[:, copy.source]


class HostKvMemory:
    """CPU: pool and arena are the same bytes."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self.pool = arena.tensor

    @property
    def fd(self) -> int:
        return self._arena.fd

    @property
    def pinned_bytes(self) -> int:
        return 0

    def publish(self, layer: int, blocks: Sequence[int], announce: Callable[[], None]) -> None:
        announce()  # computed in place

    def look(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def absorb(self, blocks: Sequence[int]) -> None:
        pass  # received in place

    def close(self) -> None:
        self._arena.close()


class DeviceKvMemory:
    """CUDA: blocks are copied between pool and arena, those that are published beside the compute. Two lanes, since blocks that
    arrive are waited for, and what is published may have to wait for prompts in the air."""

    def __init__(
        self,
        arena: Arena,
        device: torch.device,
        publications: CopyLane,
        arrivals: CopyLane,
        pinned: PinnedMemory | None = None,
    ) -> None:
        self._arena = arena
        self._pinned = pinned
        self._publications = publications
        self._arrivals = arrivals
        self._exports = Exports()
        self.pool = torch.zeros_like(arena.tensor, device=device)

    @property
    def fd(self) -> int:
        return self._arena.fd

    @property
    def pinned_bytes(self) -> int:
        return self._pinned.size_bytes if self._pinned is not None else 0

    def publish(self, layer: int, blocks: Sequence[int], announce: Callable[[], None]) -> None:
        self._exports.announce_ended()
        target, source = self._arena.tensor[layer], self.pool[layer]
        self._exports.add(self._publications.copy([Copy(target[run], source[run]) for run in runs(blocks)]), announce)

    def look(self) -> None:
        self._exports.announce_ended()

    def settle(self) -> None:
        self._exports.settle()

    def absorb(self, blocks: Sequence[int]) -> None:
        layers = zip(self.pool, self._arena.tensor, strict=True)
        copies = [Copy(pool[run], arena[run]) for pool, arena in layers for run in runs(blocks)]
        self._arrivals.copy(copies).synchronize()

    def close(self) -> None:
        self._exports.abandon()
        if self._pinned is not None:
            self._pinned.close()
        self._arena.close()


class Arena:
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
