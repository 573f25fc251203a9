"""Owns one forward pass over a step's batch: the decoder's pieces with paged attention between them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.cuda_graphs import DecodeGraphs, EagerPieces, Pieces
from engine.decoder import Decoder
from engine.paged_attention import PagedAttention
from engine.step_batch import StepBatch


class ForwardPass:
    def __init__(self, decoder: Decoder, attention: PagedAttention, graphs: DecodeGraphs | None = None) -> None:
        self._decoder = decoder
        self._attention = attention
        self._graphs = graphs

    def run(self, batch: StepBatch, layer_written: Callable[[int], None]) -> torch.Tensor:
        """Writes the KV of every row into the pool and returns the last hidden state [n, hidden], valid until the next run.

        `layer_written(layer)` is called as soon as the KV of that layer is complete, before its attention.
        """
        pieces, attention = self._pieces(batch), self._attention.step(batch)
        query, key, value = pieces.begin(batch)
        last = self._decoder.spec.layers - 1
        for layer in range(last + 1):
            attention.write(layer, key, value)
            layer_written(layer)
            attended = attention.attend(layer, query, key, value)
            if layer < last:
                query, key, value = pieces.between(layer, attended)
        return pieces.end(attended)

    def _pieces(self, batch: StepBatch) -> Pieces:
        graphed = None if self._graphs is None else self._graphs.pieces(batch)
        return graphed or EagerPieces(self._decoder)
