"""Owns one forward pass over a step's batch: the decoder's pieces with paged attention between them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.attention import attend_all, attend_causal, attend_rows, merge
from engine.decoder import Decoder
from engine.step_batch import RowGroup, Span, StepBatch


class ForwardPass:
    """pool: [layer, block, k or v, page token, kv_head, dim]."""

    def __init__(self, decoder: Decoder, pool: torch.Tensor) -> None:
        self._decoder = decoder
        _, blocks, _, self._page_tokens, kv_heads, dim = pool.shape
        self._heads = (kv_heads, dim)
        self._tokens = [layer.view(blocks * 2 * self._page_tokens, kv_heads * dim) for layer in pool]
        self._pages = [layer.view(blocks * 2, self._page_tokens * kv_heads * dim) for layer in pool]

    def run(self, batch: StepBatch, layer_written: Callable[[int], None]) -> torch.Tensor:
        """Writes the KV of every row into the pool and returns the last hidden state [n, hidden].

        `layer_written(layer)` is called as soon as the KV of that layer is complete, before its attention.
        """
        decoder = self._decoder
        key_slots, value_slots = self._slots(batch.slots)
        masks = [self._mask(group) for group in batch.groups]
        rotary = decoder.rotary(batch.positions, batch.highest_position)
        hidden = decoder.embed(batch.token_ids)
        for layer in range(decoder.spec.layers):
            query, key, value = decoder.pre(layer, hidden, rotary)
            rows = self._tokens[layer]
            rows.index_copy_(0, key_slots, key.reshape(len(key), -1))
            rows.index_copy_(0, value_slots, value.reshape(len(value), -1))
            layer_written(layer)
            attended = torch.empty_like(query)
            for group, mask in zip(batch.groups, masks, strict=True):
                attended[group.rows] = self._attend_group(layer, query[group.rows], group, mask)
            for span in batch.spans:
                part = slice(span.start, span.start + span.count)
                attended[part] = self._attend_span(layer, query[part], key[part], value[part], span)
            hidden = decoder.post(layer, hidden, attended)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, vocab], float32."""
        return self._decoder.head(hidden)

    def _slots(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of K and of V: a block is page_tokens rows of K, then as many of V."""
        page = self._page_tokens
        keys = slots + slots.div(page, rounding_mode="floor") * page
        return keys, keys + page

    def _mask(self, group: RowGroup) -> torch.Tensor:
        places = torch.arange(group.blocks.shape[1] * self._page_tokens, device=group.lengths.device)
        mask = torch.zeros(len(group.lengths), len(places), dtype=self._decoder.dtype, device=places.device)
        mask.masked_fill_(places >= group.lengths.unsqueeze(1), float("-inf"))
        return mask[:, None, None, :]

    def _gather(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of `blocks` [..., pages] -> [..., pages * page_tokens, kv_heads, dim]."""
        shape = (*blocks.shape[:-1], blocks.shape[-1] * self._page_tokens, *self._heads)
        pages, flat = self._pages[layer], blocks.flatten() * 2
        return pages.index_select(0, flat).view(shape), pages.index_select(0, flat + 1).view(shape)

    def _attend_group(self, layer: int, query: torch.Tensor, group: RowGroup, mask: torch.Tensor) -> torch.Tensor:
        keys, values = self._gather(layer, group.blocks)
        return attend_rows(query, keys, values, mask).output

    def _attend_span(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, span: Span
    ) -> torch.Tensor:
        own = attend_causal(query, key, value)
        if not span.past:
            return own.output
        keys, values = self._gather(layer, span.blocks)
        return merge(attend_all(query, keys[: span.past], values[: span.past]), own).output.to(query.dtype)
