"""Owns block tables: which blocks hold the KV of a sequence, shared by prefix, forked copy-on-write, entered in the index. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.pool import BlockPool, PoolExhausted
from engine.prefix_index import KeyChain, PrefixIndex
from engine.protocol import KvEvicted, KvStored


@dataclass(slots=True, eq=False)
class Table:
    """Blocks of one sequence, in order. The first `stored` of them went to the index, or were found there."""

    blocks: array[int]  # int32: one step reads all tables, so they lie ready for numpy
    chain: KeyChain
    stored: int = 0


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Content of `source` must be copied to `target`, in every layer, before the next step writes."""

    source: int
    target: int


class BlockTables:
    """All tables of one engine: the only holder of pool and index, so that they cannot disagree."""

    def __init__(self, pool: BlockPool, page_tokens: int) -> None:
        self.pool = pool
        self.page_tokens = page_tokens
        self._index = PrefixIndex()
        self._news: list[KvStored | KvEvicted] = []

    def pages_for(self, token_count: int) -> int:
        return -(-token_count // self.page_tokens)

    def open(self, tokens: array[int], chain: KeyChain, reusable_tokens: int, spare: int) -> Table | None:
        """A table for the KV of `tokens`; at most `reusable_tokens` of them are taken from the index, as `stored` says.

        All or nothing: None if it would leave fewer than `spare` blocks available.
        """
        matched = self._index.lookup(chain.pages(tokens, reusable_tokens // self.page_tokens))
        fresh = self.pages_for(len(tokens)) - len(matched)
        if self.pool.available - self.pool.unheld(matched) - fresh < spare:
            return None
        self.pool.share(matched)
        return Table(array("i", [*matched, *self._allocate(fresh)]), chain, len(matched))

    def has_room(self, table: Table, position: int) -> bool:
        """Whether the token at `position` can be written without a new block."""
        page = position // self.page_tokens
        return page < len(table.blocks) and self.pool.references(table.blocks[page]) == 1

    def make_room(self, table: Table, position: int) -> BlockCopy | None:
        """A new block at a page border, or a private copy of a block that others hold too. Raises PoolExhausted."""
        page = position // self.page_tokens
        if page == len(table.blocks):
            table.blocks.extend(self._allocate(1))
            return None
        shared = table.blocks[page]
        (private,) = self._allocate(1)
        table.blocks[page] = private
        self._release([shared])
        return BlockCopy(shared, private)

    def fork(self, table: Table) -> Table:
        """A second table over the same blocks, copy-on-write."""
        self.pool.share(table.blocks)
        return Table(table.blocks[:], table.chain.fork(), table.stored)

    def close(self, table: Table) -> None:
        self._release(table.blocks)
        del table.blocks[:]

    def store(self, table: Table, tokens: array[int], computed: int) -> None:
        """The KV of the first `computed` tokens is final: full pages enter the index."""
        full = computed // self.page_tokens
        if full <= table.stored:
            return
        pages = table.chain.pages(tokens, full)
        for page, block in zip(pages[table.stored :], table.blocks[table.stored :], strict=False):
            if self._index.store(block, page):
                self._tell(KvStored(page.unit_keys))
        table.stored = full

    def clear_cached(self) -> None:
        """Forgets every block that nobody holds."""
        for block in self.pool.drop_cached():
            self._tell(KvEvicted(self._index.forget(block)))

    def take_news(self) -> list[KvStored | KvEvicted]:
        """What entered and left the index since the last call, in order."""
        news, self._news = self._news, []
        return news

    def leaked(self, tables: Iterable[Table]) -> int:
        return self.pool.leaked(table.blocks for table in tables)

    def _allocate(self, count: int) -> list[int]:
        blocks, evicted = self.pool.allocate(count)
        for block in evicted:
            self._tell(KvEvicted(self._index.forget(block)))
        return blocks

    def _release(self, blocks: Sequence[int]) -> None:
        self.pool.release(blocks, [block in self._index for block in blocks])

    def _tell(self, news: KvStored | KvEvicted) -> None:
        """Neighbours of a kind become one event; stored and evicted keep their order."""
        if self._news and type(self._news[-1]) is type(news):
            news = type(news)(self._news.pop().block_hashes + news.block_hashes)
        self._news.append(news)


__all__ = ["BlockCopy", "BlockTables", "PoolExhausted", "Table"]
