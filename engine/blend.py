"""Owns the blend of chunks: a prompt's KV from chunks that were computed alone, with the tokens that matter computed anew.

Algorithm card 3: CacheBlend (EuroSys'25) and EPIC (2024). The result is approximate: it must never enter the exact prefix index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from engine.blend_selection import Recipe, Span, deviations, keep, lay_out, plan_selection
from engine.chunk_kv import PlacedChunk
from engine.decoder import Decoder
from engine.row_tiles import in_tiles
from engine.scattered_attention import ScatteredAttention, ScatteredRows


@dataclass(frozen=True, slots=True)
class BlendPrompt:
    """token_ids: the whole prompt; the KV of the first `past` of them lies in `blocks` already and is exact.
    blocks: int32 [pages], with room for all tokens; chunks: in order, disjoint, from `past` on."""

    token_ids: Sequence[int]
    blocks: np.ndarray
    chunks: Sequence[PlacedChunk]
    past: int = 0


@dataclass(frozen=True, slots=True)
class Blended:
    """hidden: of the last token [1, hidden], for the head. `computed`: per layer, the positions whose KV was computed; the KV of the
    others came from chunks."""

    hidden: torch.Tensor
    computed: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class _Flow:
    """The rows that are being computed. rows: int64 [n], on the host."""

    rows: torch.Tensor
    hidden: torch.Tensor
    rotary: torch.Tensor
    access: ScatteredRows


class BlendPass:
    """Works on the prompt's blocks of the pool that `attention` is over."""

    def __init__(self, decoder: Decoder, attention: ScatteredAttention) -> None:
        self._decoder = decoder
        self._attention = attention

    @torch.inference_mode()
    def run(
        self, prompt: BlendPrompt, recipe: Recipe, layer_written: Callable[[int], None] = lambda layer: None
    ) -> Blended:
        """Writes the KV of all tokens into the prompt's blocks. `layer_written(layer)`: the KV of that layer is complete.

        Raises InvalidRequest for chunks that do not fit, and whatever the reader of a chunk raises: the blocks are then undefined.
        """
        run = BlendRun(self._decoder, self._attention, prompt, recipe)
        for _ in range(self._decoder.spec.layers):
            run.advance(layer_written)
        return run.result()


class BlendRun:
    """One prompt's blend, a layer at a time."""

    def __init__(self, decoder: Decoder, attention: ScatteredAttention, prompt: BlendPrompt, recipe: Recipe) -> None:
        self._decoder = decoder
        self._attention = attention
        self._prompt = prompt
        total, past = len(prompt.token_ids), prompt.past
        spans = [Span(chunk.start, chunk.source.tokens) for chunk in prompt.chunks]
        self._layout = lay_out(past, total, spans)
        self._selection = plan_selection(recipe, decoder.spec.layers, self._layout)
        self._positions = torch.arange(past, total)
        self._rotary = decoder.rotary(self._positions.to(decoder.device), total - 1)
        rows = self._layout.chunk_rows
        self._chunk_rotary = self._rotary.index_select(0, rows.to(decoder.device))
        self._chunk_access = self._access(rows) if len(rows) else None
        ends = list(accumulate(span.tokens for span in spans))
        self._parts = [slice(end - span.tokens, end) for span, end in zip(spans, ends, strict=True)]
        self._layer = 0
        self._computed: list[torch.Tensor] = []
        first = self._selection.first
        token_ids = torch.tensor(prompt.token_ids[past:], dtype=torch.int64).index_select(0, first).to(decoder.device)
        self._flow = self._flow_of(first, decoder.embed(token_ids))
        # Of the chunks' tokens in one layer after the other: fresh pages for each would cost more than the copies into them.
        shape = (len(rows), decoder.spec.kv_heads, decoder.spec.head_dim)
        self._taken = (self._flow.hidden.new_empty(shape), self._flow.hidden.new_empty(shape))

    @property
    def reads_chunks(self) -> bool:
        """Whether the next layer reads the chunks' KV. The first one does not where all tokens flow through it."""
        whole = len(self._flow.rows) == len(self._positions)
        return bool(self._prompt.chunks) and (not whole or self._selection.kept[self._layer] is not None)

    @torch.inference_mode()
    def advance(self, layer_written: Callable[[int], None] = lambda layer: None) -> None:
        """Computes the next layer."""
        decoder, layer, flow, heads = self._decoder, self._layer, self._flow, self._decoder.spec.heads
        query_key, value = self._project(flow.hidden)
        chunks = self._load() if self.reads_chunks else None
        chosen = self._chosen(query_key[:, heads:], value, chunks)
        if chunks is not None and len(flow.rows) < len(self._positions):
            self._place(*chunks)
        query_key = decoder.rotate(query_key, flow.rotary)
        flow.access.write(layer, query_key[:, heads:], value)  # over what came from the chunks
        self._computed.append(self._positions[flow.rows])
        layer_written(layer)
        query, hidden = query_key[:, :heads], flow.hidden
        if chosen is not None:
            on_device = chosen.to(hidden.device)
            query = query.index_select(0, on_device)
            flow = self._flow_of(flow.rows[chosen], hidden.index_select(0, on_device))
        attended = flow.access.attend(layer, query)
        hidden = in_tiles(lambda *tile: decoder.post(layer, *tile), flow.hidden, attended)
        self._flow = _Flow(flow.rows, hidden, flow.rotary, flow.access)
        self._layer += 1

    def result(self) -> Blended:
        """After the last layer."""
        assert self._layer == self._decoder.spec.layers
        return Blended(self._flow.hidden, tuple(self._computed))

    def _project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k together, not rotated, and v, in tiles of rows."""
        layer, spec = self._layer, self._decoder.spec
        stacked = in_tiles(lambda tile: torch.cat(self._decoder.project(layer, tile), 1), hidden)
        return stacked[:, : spec.heads + spec.kv_heads], stacked[:, spec.heads + spec.kv_heads :]

    def _load(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Key before rotation and value of all chunk tokens in this layer, in the compute dtype."""
        keys, values = self._taken
        for chunk, part in zip(self._prompt.chunks, self._parts, strict=True):
            keys[part], values[part] = chunk.source.layer(self._layer)
        return keys, values

    def _place(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Writes the chunks' KV to their positions. `key` is rotated in place."""
        assert self._chunk_access is not None
        self._chunk_access.write(self._layer, self._decoder.rotate(key, self._chunk_rotary), value)

    def _chosen(
        self, key: torch.Tensor, value: torch.Tensor, chunks: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor | None:
        """Numbers of the flowing rows that go on after this layer's KV, on the host; None: all do."""
        rows, kept = self._flow.rows, self._selection.kept[self._layer]
        if self._layer + 1 == self._decoder.spec.layers:
            return torch.tensor([len(rows) - 1])
        if kept is None or chunks is None or kept >= len(rows):
            return None
        ordinals = self._layout.ordinals[rows].clamp_(min=0).to(key.device)
        taken = chunks[0].index_select(0, ordinals), chunks[1].index_select(0, ordinals)
        return keep(deviations((key, value), taken), self._layout.fresh[rows].to(key.device), kept).cpu()

    def _flow_of(self, rows: torch.Tensor, hidden: torch.Tensor) -> _Flow:
        return _Flow(rows, hidden, self._rotary.index_select(0, rows.to(hidden.device)), self._access(rows))

    def _access(self, rows: torch.Tensor) -> ScatteredRows:
        return self._attention.rows(self._prompt.blocks, self._positions[rows])
