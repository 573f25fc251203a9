"""Owns the KV bytes of a modelled engine: a memfd in the arena's layout, filled with a pattern of the tokens it stands for.

Whoever computes the pattern of the same tokens can tell whether a block arrived whole, in the right place.
"""

from __future__ import annotations

import mmap
import os

import xxhash

from engine.protocol import Layout


class KvMemory:
    """[layer][block] slices of block_bytes. `digest` names all tokens up to the end of the block's content."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.size_bytes = layout.layers * layout.blocks * layout.block_bytes
        self.fd = os.memfd_create("pdserve-modelled-kv", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size_bytes)
        self._map = mmap.mmap(self.fd, self.size_bytes)

    def write(self, block: int, digest: bytes) -> None:
        for layer in range(self._layout.layers):
            start = self._offset(layer, block)
            self._map[start : start + self._layout.block_bytes] = self._pattern(layer, digest)

    def matches(self, block: int, digest: bytes) -> bool:
        return all(self._slice(layer, block) == self._pattern(layer, digest) for layer in range(self._layout.layers))

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)

    def _offset(self, layer: int, block: int) -> int:
        return (layer * self._layout.blocks + block) * self._layout.block_bytes

    def _slice(self, layer: int, block: int) -> bytes:
        start = self._offset(layer, block)
        return self._map[start : start + self._layout.block_bytes]

    def _pattern(self, layer: int, digest: bytes) -> bytes:
        word = xxhash.xxh3_128_digest(digest, seed=layer)
        return (word * (self._layout.block_bytes // len(word) + 1))[: self._layout.block_bytes]
