"""Owns one forward pass over a step's batch: the decoder's pieces with paged attention between them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.decoder import Decoder
from engine.paged_attention import PagedAttention
from engine.step_batch import StepBatch


class ForwardPass:
    def __init__(self, decoder: Decoder, attention: PagedAttention) -> None:
        self._decoder = decoder
        self._attention = attention

    def run(self, batch: StepBatch, layer_written: Callable[[int], None]) -> torch.Tensor:
        """Writes the KV of every row into the pool and returns the last hidden state [n, hidden].

        `layer_written(layer)` is called as soon as the KV of that layer is complete, before its attention.
        """
        decoder = self._decoder
        attention = self._attention.step(batch)
        rotary = decoder.rotary(batch.positions, batch.highest_position)
        hidden = decoder.embed(batch.token_ids)
        for layer in range(decoder.spec.layers):
            query, key, value = decoder.pre(layer, hidden, rotary)
            attention.write(layer, key, value)
            layer_written(layer)
            hidden = decoder.post(layer, hidden, attention.attend(layer, query, key, value))
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, vocab], float32."""
        return self._decoder.head(hidden)
