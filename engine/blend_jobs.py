"""Owns the blends in progress: a prompt's KV from its chunks, a piece of work per step, so that decodes go on beside it.

    admit --> chunks that the index lacks are computed alone, one per step --> one layer per step --> the sequence goes on

A chunk's pages are pages of the pool like others, indexed by content, with keys before rotation: they are offered to the tiers
and loaded from them the same way. The blended KV itself belongs to its sequence alone.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.blend import BlendPrompt, BlendRun
from engine.blend_selection import Blend, Epic, Recipe, computed_share
from engine.block_tables import BlockTables, Table
from engine.chunk_kv import ChunkIsolation, PlacedChunk
from engine.kv_memory import KvMemory
from engine.loaded_model import LoadedModel
from engine.paged_attention import PagedPool
from engine.prefix_index import KeyChain
from engine.protocol import BlendSpec, ChunkSpan
from engine.scattered_attention import open_scattered
from engine.sequences import Sequence
from kv_transfer.keys import chunk_seed, padded_chunk

# Above this share of a whole prefill a blend is not worth its approximation.
MOST_COMPUTED = 0.8

LayerWritten = Callable[[Sequence, int], None]


@dataclass(frozen=True, slots=True)
class _OpenChunk:
    """tokens: padded to whole pages; the first table.stored pages of them are there."""

    span: ChunkSpan
    tokens: array[int]
    table: Table


@dataclass(slots=True)
class _Job:
    sequence: Sequence
    recipe: Recipe
    chunks: list[_OpenChunk]
    missing: deque[_OpenChunk] = field(default_factory=deque)
    run: BlendRun | None = None
    layers_done: int = 0


class BlendJobs:
    def __init__(self, model: LoadedModel, memory: KvMemory, tables: BlockTables, fingerprint_seed: int) -> None:
        self._model = model
        self._tables = tables
        self._seed = chunk_seed(fingerprint_seed)
        self._pool = PagedPool(memory.pool)
        self._attention = open_scattered(memory.pool, model.kernels, model.spec.windows)
        self._isolation = ChunkIsolation(model.decoder, model.kernels, memory.pool.dtype)
        self._jobs: deque[_Job] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    def admit(self, sequence: Sequence, spare: int) -> int:
        """Takes up a sequence that holds its table. Returns the tokens of its chunks; 0: it is computed whole, because that is about
        as fast, or because the chunks' blocks would leave fewer than `spare` available."""
        assert sequence.blends
        assert sequence.table is not None
        work = sequence.state.work
        sequence.blends = False
        if work.blend is None:
            return 0
        recipe, counts = _recipe(work.blend), [span.count for span in work.chunks]
        # Of the prompt alone, so that a request that comes again with output behind its prompt is computed as before.
        if computed_share(recipe, self._model.spec.layers, work.prompt_tokens, counts) > MOST_COMPUTED:
            return 0
        chunks = self._open(work.chunks, sequence, spare)
        if chunks is None:
            return 0
        # What is computed alone now costs this prompt time, and saves it to every later one.
        missing = deque(chunk for chunk in chunks if chunk.table.stored < len(chunk.table.blocks))
        sequence.blends = True
        self._jobs.append(_Job(sequence, recipe, chunks, missing))
        return sum(counts)

    def advance(self, layer_written: LayerWritten) -> Sequence | None:
        """One piece of the oldest job. Returns its sequence once the KV of all its tokens but the last is there."""
        while self._jobs and self._jobs[0].sequence.table is None:
            self._close(self._jobs.popleft().chunks)  # it was cancelled
        if not self._jobs:
            return None
        job = self._jobs[0]
        if job.missing:
            self._isolate(job.missing.popleft())
            return None
        if job.run is None:
            job.run = self._run_of(job)
        job.run.advance(lambda layer: layer_written(job.sequence, layer))
        job.layers_done += 1
        if job.layers_done < self._model.spec.layers:
            return None
        self._jobs.popleft()
        self._close(job.chunks)
        sequence = job.sequence
        sequence.blends = False
        sequence.computed = len(sequence.tokens) - 1
        return sequence

    def held_tables(self) -> Iterator[Table]:
        return (chunk.table for job in self._jobs for chunk in job.chunks)

    # ---- parts

    def _open(self, spans: tuple[ChunkSpan, ...], sequence: Sequence, spare: int) -> list[_OpenChunk] | None:
        """The pages of all chunks, or of none."""
        opened: list[_OpenChunk] = []
        for span in spans:
            chunk = self._opened(span, sequence, spare)
            if chunk is None:
                self._close(opened)
                return None
            opened.append(chunk)
        return opened

    def _opened(self, span: ChunkSpan, sequence: Sequence, spare: int) -> _OpenChunk | None:
        page_tokens = self._tables.page_tokens
        content = sequence.tokens[span.start : span.start + span.count].tobytes()
        tokens = array("i", padded_chunk(content, page_tokens))
        chain = KeyChain(page_tokens, span.keys, self._seed, sequence.state.work.tenant)
        table = self._tables.open(tokens, chain, len(tokens), spare)
        return _OpenChunk(span, tokens, table) if table is not None else None

    def _isolate(self, chunk: _OpenChunk) -> None:
        """Computes a chunk alone into those of its pages that were not there."""
        first, count = chunk.table.stored * self._tables.page_tokens, chunk.span.count
        computed = self._isolation.isolate(chunk.tokens[:count])
        positions = torch.arange(first, count)
        blocks = torch.tensor(chunk.table.blocks, dtype=torch.int64)
        page_tokens = self._tables.page_tokens
        slots = blocks[positions // page_tokens] * page_tokens + positions % page_tokens
        rows = self._pool.rows(slots.to(self._model.device))
        for layer in range(self._model.spec.layers):
            key, value = computed.layer(layer)
            self._pool.write(layer, rows, key[first:], value[first:])
        self._tables.store(chunk.table, chunk.tokens, len(chunk.tokens))

    def _run_of(self, job: _Job) -> BlendRun:
        sequence = job.sequence
        assert sequence.table is not None
        blocks = np.array(sequence.table.blocks, dtype=np.int32)
        placed = [PlacedChunk(chunk.span.start, self._pooled(chunk)) for chunk in job.chunks]
        # The last token's KV and logits come from an ordinary step afterwards.
        prompt = BlendPrompt(sequence.tokens[:-1], blocks, placed)
        return BlendRun(self._model.decoder, self._attention, prompt, job.recipe)

    def _pooled(self, chunk: _OpenChunk) -> _PooledChunk:
        blocks = torch.tensor(chunk.table.blocks, dtype=torch.int64, device=self._model.device)
        return _PooledChunk(self._pool, blocks, chunk.span.count)

    def _close(self, chunks: list[_OpenChunk]) -> None:
        for chunk in chunks:
            self._tables.close(chunk.table)


@dataclass(frozen=True, slots=True)
class _PooledChunk:
    """Implements engine.chunk_kv.ChunkKv over pages of the pool. blocks: int64 [pages]."""

    pool: PagedPool
    blocks: torch.Tensor
    tokens: int

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self.pool.gather(layer, self.blocks, self.pool.dtype)
        return key[: self.tokens], value[: self.tokens]


def _recipe(spec: BlendSpec) -> Recipe:
    return Epic(spec.first_tokens) if spec.method == "epic" else Blend(spec.ratio)
