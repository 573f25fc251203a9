"""Owns the KV of a chunk computed alone: its form, one that lies in memory, and its computation.

Keys are kept before their rotation, so that one copy serves every position (algorithm card 3, after CacheBlend, EuroSys'25).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from engine.decoder import Decoder
from engine.kernels.library import Kernels
from engine.paged_attention import PagedPool
from engine.row_tiles import in_tiles
from engine.scattered_attention import open_scattered

_PAGE_TOKENS = 16


class ChunkKv(Protocol):
    """Reads the KV of one chunk layer by layer. Layers are asked for in ascending order, each at most once; some never."""

    @property
    def tokens(self) -> int: ...

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key before rotation and value, each [tokens, kv_heads, head_dim] of any floating dtype. May wait, under a deadline of its
        own, while the layer is on its way: what it raises ends the blend."""


@dataclass(frozen=True, slots=True)
class ResidentChunk:
    """A ChunkKv whose layers all lie in memory. key, value: [layers, tokens, kv_heads, head_dim]."""

    key: torch.Tensor
    value: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.key.shape[1]

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.key[layer], self.value[layer]


@dataclass(frozen=True, slots=True)
class PlacedChunk:
    """Where a chunk lies in a prompt: its tokens are those at [start, start + source.tokens)."""

    start: int
    source: ChunkKv


class ChunkIsolation:
    """Computes chunks alone, as if each were a whole prompt: positions 0 .. n - 1, KV rounded to `dtype` as in a pool of it."""

    def __init__(self, decoder: Decoder, kernels: Kernels | None, dtype: torch.dtype) -> None:
        self._decoder = decoder
        self._kernels = kernels
        self._dtype = dtype

    @torch.inference_mode()
    def isolate(self, token_ids: Sequence[int]) -> ResidentChunk:
        """token_ids: at least one. Key and value in the isolation's dtype, on the decoder's device."""
        decoder, spec, count = self._decoder, self._decoder.spec, len(token_ids)
        blocks, positions = np.arange(-(-count // _PAGE_TOKENS), dtype=np.int32), torch.arange(count)
        page = (len(blocks), 2, _PAGE_TOKENS, spec.kv_heads, spec.head_dim)
        # One layer's memory for all of them: a layer is done when the next one begins.
        scratch = torch.zeros(1, *page, dtype=self._dtype, device=decoder.device).expand(spec.layers, *page)
        rows, stored = (
            open_scattered(scratch, self._kernels, spec.windows).rows(blocks, positions),
            PagedPool(scratch).stored,
        )
        rotary = decoder.rotary(positions.to(decoder.device), count - 1)
        hidden = decoder.embed(torch.tensor(token_ids, device=decoder.device))
        chunk = ResidentChunk(*(self._empty(count) for _ in range(2)))
        for layer in range(spec.layers):
            query_key, value = decoder.project(layer, hidden)
            chunk.key[layer], chunk.value[layer] = stored(query_key[:, spec.heads :]), stored(value)
            if layer + 1 == spec.layers:
                break
            query_key = decoder.rotate(query_key, rotary)
            rows.write(layer, query_key[:, spec.heads :], value)
            attended = rows.attend(layer, query_key[:, : spec.heads])
            hidden = in_tiles(lambda *tile, at=layer: decoder.post(at, *tile), hidden, attended)
        return chunk

    def _empty(self, count: int) -> torch.Tensor:
        spec = self._decoder.spec
        return torch.empty(
            spec.layers, count, spec.kv_heads, spec.head_dim, dtype=self._dtype, device=self._decoder.device
        )
