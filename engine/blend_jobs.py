"""Owns the blends in progress: a prompt's KV from its chunks, a piece of work per step, so that decodes go on beside it.

    admit --> chunks that are nowhere are computed alone, one per step --> one layer per step --> the sequence goes on

Pages that are on their way from a tier are waited for where a layer reads them, not before: with CacheBlend the first layer is
computed meanwhile, whole, and chunks that are nowhere are. A chunk's pages are pages of the pool like others, indexed by content,
with keys before rotation: they are offered to the tiers and loaded from them the same way. The blended KV itself belongs to its
sequence alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from engine.blend import BlendPrompt, BlendRun
from engine.blend_chunks import BlendChunks, OpenChunk, tables_of
from engine.blend_selection import Blend, Epic, Recipe, computed_share
from engine.block_tables import Table
from engine.chunk_kv import PlacedChunk
from engine.kv_memory import KvMemory
from engine.loaded_model import LoadedModel
from engine.protocol import BlendSpec
from engine.scattered_attention import open_scattered
from engine.sequences import Sequence

# Above this share of a whole prefill a blend is not worth its approximation.
MOST_COMPUTED = 0.8

LayerWritten = Callable[[Sequence, int], None]


@dataclass(slots=True, eq=False)
class _Job:
    sequence: Sequence
    recipe: Recipe
    chunks: list[OpenChunk]
    run: BlendRun | None = None
    layers_done: int = 0

    @property
    def waits(self) -> bool:
        """Whether the next layer reads pages that are on their way."""
        return self.run is not None and self.run.reads_chunks and any(chunk.coming for chunk in self.chunks)


class BlendJobs:
    def __init__(self, model: LoadedModel, memory: KvMemory, chunks: BlendChunks) -> None:
        self._model = model
        self._chunks = chunks
        self._attention = open_scattered(memory.pool, model.kernels, model.spec.windows)
        self._jobs: list[_Job] = []  # oldest first

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
        chunks = self._chunks.open(sequence, spare)
        if chunks is None:
            return 0
        sequence.blends = True
        self._jobs.append(_Job(sequence, recipe, chunks))
        return sum(counts)

    def advance(self, layer_written: LayerWritten) -> bool:
        """One piece of the oldest job that does not wait for pages. False: there is none."""
        self._drop_cancelled()
        return any(self._work_on(job, layer_written) for job in self._jobs)

    def held_tables(self) -> Iterator[Table]:
        for job in self._jobs:
            yield from tables_of(job.chunks)

    # ---- parts

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._jobs if job.sequence.table is None]:
            self._end(job)

    def _work_on(self, job: _Job, layer_written: LayerWritten) -> bool:
        for chunk in job.chunks:
            self._chunks.settle(chunk)
        # What is computed alone now costs this prompt time, and saves it to every later one.
        short = next((chunk for chunk in job.chunks if chunk.short), None)
        if short is not None:
            self._chunks.compute(short)
            return True
        if job.run is None:
            job.run = self._run_of(job)
        if job.waits:
            return False
        job.run.advance(lambda layer: layer_written(job.sequence, layer))
        job.layers_done += 1
        if job.layers_done == self._model.spec.layers:
            self._end(job)
            job.sequence.blends = False
            job.sequence.computed = len(job.sequence.tokens) - 1
        return True

    def _end(self, job: _Job) -> None:
        self._jobs.remove(job)
        self._chunks.close(job.chunks)

    def _run_of(self, job: _Job) -> BlendRun:
        sequence = job.sequence
        assert sequence.table is not None
        blocks = np.array(sequence.table.blocks, dtype=np.int32)
        placed = [PlacedChunk(chunk.span.start, chunk) for chunk in job.chunks]
        # The last token's KV and logits come from an ordinary step afterwards.
        prompt = BlendPrompt(sequence.tokens[:-1], blocks, placed)
        return BlendRun(self._model.decoder, self._attention, prompt, job.recipe)


def _recipe(spec: BlendSpec) -> Recipe:
    return Epic(spec.first_tokens) if spec.method == "epic" else Blend(spec.ratio)
