"""Owns the seam of attention over the paged pool: prepared once per step, called once per layer. And the pool's views."""

from __future__ import annotations

from typing import Protocol

import torch

from engine.step_batch import StepBatch


class StepAttention(Protocol):
    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Puts key and value [n, kv_heads, dim] of the step's rows into the pool."""

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [n, heads, dim] -> [n, heads, dim], after `write` of the same key and value."""


class PagedAttention(Protocol):
    """Implementations: `torch_attention`, `kernel_attention`. Contract: tests/engine/test_paged_attention.py."""

    def step(self, batch: StepBatch) -> StepAttention: ...


# Beyond it a type without infinities has only NaN, as torch alone would write there.
_HIGHEST = {torch.float8_e4m3fn: 448.0}


class PagedPool:
    """Views of the pool [layer, block, k or v, page token, kv_head, dim]."""

    def __init__(self, pool: torch.Tensor) -> None:
        _, blocks, _, self.page_tokens, self.kv_heads, self.dim = pool.shape
        self.dtype = pool.dtype
        self.device = pool.device
        self.layers = list(pool)
        # torch copies rows of bytes to places of an index, but not of float8.
        self._bits = torch.uint8 if self.dtype.itemsize == 1 else self.dtype
        raw = pool.view(self._bits)
        self._tokens = [layer.view(blocks * 2 * self.page_tokens, self.kv_heads * self.dim) for layer in raw]
        self._pages = [layer.view(blocks * 2, self.page_tokens * self.kv_heads * self.dim) for layer in pool]

    def rows(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of K and of V for `slots` [n]: a block is page_tokens rows of K, then as many of V."""
        keys = slots + slots.div(self.page_tokens, rounding_mode="floor") * self.page_tokens
        return keys, keys + self.page_tokens

    def write(
        self, layer: int, rows: tuple[torch.Tensor, torch.Tensor], key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """key, value: [n, kv_heads, dim]."""
        for places, data in zip(rows, (key, value), strict=True):
            self._tokens[layer].index_copy_(0, places, self.stored(data.reshape(len(data), -1)).view(self._bits))

    def stored(self, data: torch.Tensor) -> torch.Tensor:
        """In the pool's dtype, to the nearest, ties to even."""
        highest = _HIGHEST.get(self.dtype)
        return (data if highest is None else data.clamp(-highest, highest)).to(self.dtype)

    def take(self, layer: int, rows: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of `rows`, as `rows` gives them -> [n, kv_heads, dim] of the pool's dtype."""
        keys, values = (
            self._tokens[layer].index_select(0, places).view(self.dtype).view(-1, self.kv_heads, self.dim)
            for places in rows
        )
        return keys, values

    def gather(self, layer: int, blocks: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of `blocks` [..., pages] int64 -> [..., pages * page_tokens, kv_heads, dim] of `dtype`."""
        shape = (*blocks.shape[:-1], blocks.shape[-1] * self.page_tokens, self.kv_heads, self.dim)
        pages, flat = self._pages[layer], blocks.flatten() * 2
        keys, values = (pages.index_select(0, flat + half).view(shape).to(dtype) for half in (0, 1))
        return keys, values
