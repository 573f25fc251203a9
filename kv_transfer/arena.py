"""Owns the io process's view of the KV arena: the engine's memfd, mapped, and cut into block ranges."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Protocol

from pdserve.errors import InternalError

_PAGE_BYTES = 4096


class ArenaLayout(Protocol):
    """What the arena needs of `engine.protocol.Layout`: [layer][block][block_bytes]."""

    @property
    def layers(self) -> int: ...

    @property
    def blocks(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ArenaShape:
    """The smallest ArenaLayout, for arenas that no engine made."""

    layers: int
    blocks: int
    block_bytes: int


class Arena:
    """Maps `fd` (which the caller keeps and may close afterwards). One (layer, block) slice is contiguous, and adjacent
    blocks of a layer are one range of bytes."""

    def __init__(self, fd: int, layout: ArenaLayout) -> None:
        self.layout = layout
        self.size_bytes = layout.layers * layout.blocks * layout.block_bytes
        held = os.fstat(fd).st_size
        if self.size_bytes <= 0 or held < self.size_bytes:
            raise InternalError(f"KV arena holds {held} bytes, its layout needs {self.size_bytes}.")
        self._view: memoryview | None = memoryview(mmap.mmap(fd, self.size_bytes))

    @classmethod
    def anonymous(cls, layout: ArenaLayout) -> Arena:
        """An arena of its own, zeroed; for tests, benchmarks and engines without one."""
        fd = os.memfd_create("pdserve-kv-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, layout.layers * layout.blocks * layout.block_bytes)
            return cls(fd, layout)
        finally:
            os.close(fd)

    def blocks(self, layer: int, first_block_id: int, count: int) -> memoryview:
        """Writable bytes (contiguous, format "B") of blocks [first_block_id, first_block_id + count) of `layer`."""
        shape = self.layout
        if self._view is None:
            raise InternalError("The KV arena is closed.")
        if not (0 <= layer < shape.layers and count > 0 and 0 <= first_block_id <= shape.blocks - count):
            raise InternalError(
                f"Blocks {first_block_id}+{count} of layer {layer} lie outside the arena "
                f"({shape.layers} layers of {shape.blocks} blocks)."
            )
        start = (layer * shape.blocks + first_block_id) * shape.block_bytes
        return self._view[start : start + count * shape.block_bytes]

    def whole(self) -> memoryview:
        """All bytes, writable, format "B"."""
        if self._view is None:
            raise InternalError("The KV arena is closed.")
        return self._view

    def prefault(self) -> None:
        """Maps every page now: the first transfer into fresh pages is 2-10 times slower. Reads, so content stays."""
        if self._view is not None:
            for start in range(0, self.size_bytes, _PAGE_BYTES):
                self._view[start]

    def close(self) -> None:
        """Forgets the mapping. Pages stay mapped while a slice handed out earlier lives, so nobody writes into a hole."""
        self._view = None
