"""Owns what is announced of a prefill's KV: which blocks become final with a batch, told layer by layer as they do."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial

from engine.block_tables import BlockTables
from engine.kv_memory import KvMemory
from engine.protocol import EventSink, KvReady
from engine.schedule import Part
from engine.sequences import Sequence


@dataclass(frozen=True, slots=True)
class Announcement:
    """Blocks of a prefill that become final: ordinals [first, first + count) of its table."""

    sequence: Sequence
    first: int
    blocks: tuple[int, ...]


class Announcer:
    """layers: of the model. A sequence's `announced` counts from the moment its blocks are named here, before they are told."""

    def __init__(self, tables: BlockTables, memory: KvMemory, layers: int, sink: EventSink) -> None:
        self._tables = tables
        self._memory = memory
        self._layers = layers
        self._sink = sink

    def tell(self, layer: int, announcements: Items[Announcement]) -> None:
        """The blocks are final in `layer`."""
        for item in announcements:
            ready = KvReady(item.sequence.state.dispatch, layer, item.first, len(item.blocks))
            self._memory.publish(layer, item.blocks, partial(self._sink.emit, ready))
        if announcements:
            self._sink.flush()  # a layer's KV leaves while the next one is computed

    def of(self, parts: Items[Part]) -> list[Announcement]:
        """What becomes final when `parts` are computed: full blocks as they come, the tail with the last chunk."""
        return [item for part in parts if (item := self._of(part)) is not None]

    def tell_cached(self, sequence: Sequence) -> None:
        """An admitted sequence: its blocks from the index are final in every layer."""
        table = sequence.table
        assert table is not None
        if sequence.state.mode != "prefill" or not table.stored:
            return
        cached = Announcement(sequence, 0, tuple(table.blocks[: table.stored]))
        sequence.announced = table.stored
        for layer in range(self._layers):
            self.tell(layer, [cached])

    def tell_blended(self, sequence: Sequence, layer: int) -> None:
        """All full pages before the last token are final in this layer."""
        if sequence.state.mode != "prefill":
            return
        assert sequence.table is not None
        sequence.announced = (len(sequence.tokens) - 1) // self._tables.page_tokens
        if sequence.announced:
            self.tell(layer, [Announcement(sequence, 0, tuple(sequence.table.blocks[: sequence.announced]))])

    def _of(self, part: Part) -> Announcement | None:
        sequence = part.sequence
        if sequence.state.mode != "prefill":
            return None
        assert sequence.table is not None
        end = sequence.computed + part.count
        pages = self._tables.pages_for(end) if part.count == sequence.missing else end // self._tables.page_tokens
        first, sequence.announced = sequence.announced, max(pages, sequence.announced)
        blocks = tuple(sequence.table.blocks[first:pages])
        return Announcement(sequence, first, blocks) if blocks else None
