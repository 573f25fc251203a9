"""Owns what the engine and the io process exchange about pages: news of the index, offers to save, loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from engine.block_tables import BlockTables, Table
from engine.kv_memory import KvMemory
from engine.page_loads import PageLoads
from engine.page_protocol import KvOffered, LoadPages, OfferPages, PagesLate, PagesLoaded, PagesSaved
from engine.protocol import EventSink


class KvExchange:
    """layers: of the model, so of every page."""

    def __init__(
        self, tables: BlockTables, memory: KvMemory, layers: int, fingerprint_seed: int, sink: EventSink
    ) -> None:
        self._tables = tables
        self._memory = memory
        self._layers = layers
        self.loads = PageLoads(tables, fingerprint_seed)
        self._sink = sink

    def handle(self, command: OfferPages | PagesSaved | LoadPages | PagesLoaded | PagesLate, spare: int) -> None:
        """spare: blocks that a load must leave available."""
        match command:
            case OfferPages():
                self._tables.offers.limit = command.limit_blocks
            case PagesSaved():
                self._tables.saved(command.blocks)
            case LoadPages():
                opened = self.loads.open(command, spare)
                if opened is not None:
                    self._once_in_arena(opened.held, lambda: self._sink.emit(opened))
            case PagesLoaded():
                self.loads.end(command, self._memory.absorb)
            case PagesLate():
                self.loads.late(command.load_id)

    def held_tables(self) -> Iterator[Table]:
        """Of loads that have not ended."""
        return self.loads.tables()

    def tell(self) -> None:
        """What entered and left the index since the last call, and what is on offer now."""
        for news in self._tables.take_news():
            self._sink.emit(news)
        offered, skipped = self._tables.offers.take()
        if offered or skipped:
            event = KvOffered(offered, skipped)
            self._once_in_arena([page.block for page in offered], lambda: self._sink.emit(event))

    def _once_in_arena(self, blocks: Sequence[int], tell: Callable[[], None]) -> None:
        """Tells it once the arena holds the last layer of `blocks`."""
        if not blocks:
            tell()
            return
        last = self._layers - 1
        for layer in range(last):
            self._memory.publish(layer, blocks, _untold)
        self._memory.publish(last, blocks, tell)


def _untold() -> None:
    """What is published layer by layer and told at the last one."""
