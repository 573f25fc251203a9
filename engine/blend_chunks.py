"""Owns the chunks of prompts that are being blended: their pages that are there, that are on their way, or that are computed alone.

    open --> coming --> settled: all there
               |           |
               |           +--> short --> computed alone into its pages
               +-- late: other pages, or none: computed alone beside the pool

A chunk's KV is the same however it came, so a blend does not depend on which of its loads were in time.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from engine.block_tables import BlockTables, Table
from engine.chunk_kv import ChunkIsolation, ResidentChunk
from engine.kv_memory import KvMemory
from engine.loaded_model import LoadedModel
from engine.page_loads import PageLoads
from engine.paged_attention import PagedPool
from engine.prefix_index import KeyChain
from engine.protocol import ChunkSpan
from engine.sequences import Sequence
from kv_transfer.keys import chunk_seed, padded_chunk


@dataclass(slots=True, eq=False)
class OpenChunk:
    """Implements engine.chunk_kv.ChunkKv. padded: its tokens, to whole pages. table: the first table.stored of its pages are there;
    None: there was no room. load_id: of the load that brings its pages; 0: none does, or it is over."""

    span: ChunkSpan
    padded: array[int]
    chain: KeyChain
    pool: PagedPool
    table: Table | None = None
    load_id: int = 0
    alone: ResidentChunk | None = None
    _blocks: torch.Tensor | None = None  # int64 [pages], on the pool's device

    @property
    def coming(self) -> bool:
        return self.load_id != 0

    @property
    def short(self) -> bool:
        """Whether some of it must be computed."""
        if self.coming or self.alone is not None:
            return False
        return self.table is None or self.table.stored < len(self.table.blocks)

    @property
    def tokens(self) -> int:
        return self.span.count

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.alone is not None:
            return self.alone.layer(layer)
        if self._blocks is None:
            assert self.table is not None
            assert not self.coming
            self._blocks = torch.tensor(self.table.blocks, dtype=torch.int64, device=self.pool.device)
        key, value = self.pool.gather(layer, self._blocks, self.pool.dtype)
        return key[: self.tokens], value[: self.tokens]


class BlendChunks:
    def __init__(
        self, model: LoadedModel, memory: KvMemory, tables: BlockTables, loads: PageLoads, fingerprint_seed: int
    ) -> None:
        self._model = model
        self._tables = tables
        self._loads = loads
        self._seed = chunk_seed(fingerprint_seed)
        self._pool = PagedPool(memory.pool)
        self._isolation = ChunkIsolation(model.decoder, model.kernels, memory.pool.dtype)

    def open(self, sequence: Sequence, spare: int) -> list[OpenChunk] | None:
        """The pages of all chunks of its work, or of none: None if they would leave fewer than `spare` blocks available."""
        work, loads = sequence.state.work, sequence.state.loads
        opened: list[OpenChunk] = []
        for span, load_id in zip(work.chunks, loads or (0,) * len(work.chunks), strict=True):
            chunk = self._chunk(span, sequence)
            coming = self._loads.coming(load_id)
            chunk.load_id = load_id if coming is not None else 0
            chunk.table = self._tables.fork(coming) if coming is not None else self._open(chunk, spare)
            if chunk.table is None:
                self.close(opened)
                return None
            opened.append(chunk)
        return opened

    def settle(self, chunk: OpenChunk) -> None:
        """Takes up what its load has brought, once that is over or late."""
        if not chunk.coming or self._loads.coming(chunk.load_id) is not None:
            return
        chunk.load_id = 0
        # Pages of a load that is late may still be written to: those are left. Of one that is over, what it brought is in the index,
        # and the room that is given back here is enough.
        self.close([chunk])
        chunk.table = self._open(chunk, 0)

    def compute(self, chunk: OpenChunk) -> None:
        """Computes a chunk alone into those of its pages that are not there, or beside the pool where it has none."""
        computed = self._isolation.isolate(chunk.padded[: chunk.tokens])
        if chunk.table is None:
            chunk.alone = computed
            return
        page_tokens = self._tables.page_tokens
        first = chunk.table.stored * page_tokens
        positions = torch.arange(first, chunk.tokens)
        blocks = torch.tensor(chunk.table.blocks, dtype=torch.int64)
        slots = blocks[positions // page_tokens] * page_tokens + positions % page_tokens
        rows = self._pool.rows(slots.to(self._model.device))
        for layer in range(self._model.spec.layers):
            key, value = computed.layer(layer)
            self._pool.write(layer, rows, key[first:], value[first:])
        self._tables.store(chunk.table, chunk.padded, len(chunk.padded))

    def close(self, chunks: Iterable[OpenChunk]) -> None:
        for chunk in chunks:
            if chunk.table is not None:
                self._tables.close(chunk.table)
                chunk.table = None

    # ---- parts

    def _chunk(self, span: ChunkSpan, sequence: Sequence) -> OpenChunk:
        page_tokens = self._tables.page_tokens
        content = sequence.tokens[span.start : span.start + span.count].tobytes()
        chain = KeyChain(page_tokens, span.keys, self._seed, sequence.state.work.tenant)
        return OpenChunk(span, array("i", padded_chunk(content, page_tokens)), chain, self._pool)

    def _open(self, chunk: OpenChunk, spare: int) -> Table | None:
        return self._tables.open(chunk.padded, chunk.chain, len(chunk.padded), spare)


def tables_of(chunks: Iterable[OpenChunk]) -> Iterator[Table]:
    return (chunk.table for chunk in chunks if chunk.table is not None)
