"""Owns block tables: which blocks hold the KV of a sequence, shared by prefix, forked copy-on-write, entered in the index. Pure."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from engine.page_protocol import OfferedPage
from engine.pool import BlockPool, PoolExhausted
from engine.prefix_index import KeyChain, PageKey, PrefixIndex
from engine.protocol import KvEvicted, KvStored

STORED_AT_ONCE = 64  # pages, 0.3 ms: between one step and the next somebody waits for


@dataclass(slots=True, eq=False)
class Table:
    """Blocks of one sequence, in order. The first `stored` of them went to the index, or were found there. `received`: full pages at
    the beginning that the peer which computed them has for its own tiers."""

    blocks: array[int]  # int32: one step reads all tables, so they lie ready for numpy
    chain: KeyChain
    stored: int = 0
    received: int = 0


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Content of `source` must be copied to `target`, in every layer, before the next step writes."""

    source: int
    target: int


class Offers:
    """Pages on offer to be saved: each holds one reference of its block until `end`. `limit`: as many at a time, the others
    wait for their turn.

    Pages that were received are kept back until one that was computed here follows them: whoever computed them saves them, and a
    second copy is needed only where a chain would begin with a hole."""

    def __init__(self) -> None:
        self.limit = 0
        self._held: set[int] = set()
        self._kept_back: dict[int, OfferedPage] = {}  # by block
        self._waiting: deque[OfferedPage] = deque()
        self._fresh: list[OfferedPage] = []
        self._skipped = 0

    def wait(self, page: OfferedPage) -> None:
        self._waiting.append(page)

    def keep_back(self, page: OfferedPage) -> None:
        self._kept_back[page.block] = page

    def let_go(self, block: int) -> OfferedPage | None:
        """Its page, if it was kept back: now it is to be saved, or it is evicted."""
        return self._kept_back.pop(block, None)

    def next_waiting(self) -> OfferedPage | None:
        """The page whose turn it is, if there is room for one. A page that was evicted and came back to its block waits twice."""
        while self._waiting and len(self._held) < self.limit:
            page = self._waiting.popleft()
            if page.block not in self._held:
                return page
        return None

    def begin(self, page: OfferedPage) -> None:
        self._held.add(page.block)
        self._fresh.append(page)

    def skip(self) -> None:
        self._skipped += 1

    def end(self, block: int) -> bool:
        """Whether `block` was on offer."""
        if block not in self._held:
            return False
        self._held.remove(block)
        return True

    def blocks(self) -> list[int]:
        return list(self._held)

    def take(self) -> tuple[tuple[OfferedPage, ...], int]:
        """Offers since the last call, and how many pages left the index before their turn came."""
        fresh, skipped = tuple(self._fresh), self._skipped
        self._fresh, self._skipped = [], 0
        return fresh, skipped


class BlockTables:
    """All tables of one engine: the only holder of pool and index, so that they cannot disagree."""

    def __init__(self, pool: BlockPool, page_tokens: int) -> None:
        self.pool = pool
        self.page_tokens = page_tokens
        self._index = PrefixIndex()
        self._unstored: dict[Table, tuple[array[int], int]] = {}
        self._news: list[KvStored | KvEvicted] = []
        self.offers = Offers()

    @property
    def key_collisions(self) -> int:
        """Lookups that met another page under the key, since the start."""
        return self._index.collisions

    def pages_for(self, token_count: int) -> int:
        return -(-token_count // self.page_tokens)

    def open(self, tokens: array[int], chain: KeyChain, reusable_tokens: int, spare: int) -> Table | None:
        """A table for the KV of `tokens`; at most `reusable_tokens` of them are taken from the index, as `stored` says.

        All or nothing: None if it would leave fewer than `spare` blocks available.
        """
        matched = self._index.lookup(chain.walk(tokens, reusable_tokens // self.page_tokens))
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
        return Table(table.blocks[:], table.chain.fork(), table.stored, table.received)

    def close(self, table: Table) -> None:
        if (unstored := self._unstored.pop(table, None)) is not None:
            self.store(table, *unstored)
        self._release(table.blocks)
        del table.blocks[:]

    def store(self, table: Table, tokens: array[int], computed: int) -> None:
        """The KV of the first `computed` tokens is final: full pages enter the index."""
        full = computed // self.page_tokens
        if full <= table.stored:
            return
        pages = table.chain.pages(tokens, full)
        fresh: list[PageKey] = []  # told at once: a whole prompt is stored between its KV and its next token
        for ordinal in range(table.stored, len(pages)):
            if self._index.store(table.blocks[ordinal], pages[ordinal]):
                fresh.append(pages[ordinal])
                self._offer(table, ordinal, pages[ordinal])
        if fresh:
            self._tell(KvStored(b"".join([page.unit_keys for page in fresh])))
        self._offer_waiting()
        table.stored = full

    def store_later(self, table: Table, tokens: array[int], computed: int) -> None:
        """As `store`, when its turn comes in `store_some`, or when `table` is closed."""
        if computed // self.page_tokens > table.stored:
            self._unstored[table] = (tokens, computed)

    def store_some(self) -> bool:
        """Stores a few pages of those that can wait. False: none did."""
        left = STORED_AT_ONCE
        for table, (tokens, computed) in list(self._unstored.items()):
            full = max(table.stored, min(computed // self.page_tokens, table.stored + left))
            left -= full - table.stored
            self.store(table, tokens, full * self.page_tokens)
            if full >= computed // self.page_tokens:
                del self._unstored[table]
            if not left:
                break
        return left < STORED_AT_ONCE

    def clear_cached(self) -> None:
        """Forgets every block that nobody holds."""
        self._forget(self.pool.drop_cached())

    def saved(self, blocks: Iterable[int]) -> None:
        """Offered blocks that are not read any more. Unknown ones change nothing."""
        ended = [block for block in blocks if self.offers.end(block)]
        self._release(ended)
        self._touch_what_lies_before(ended)
        self._offer_waiting()

    def take_news(self) -> list[KvStored | KvEvicted]:
        """What entered and left the index since the last call, in order."""
        news, self._news = self._news, []
        return news

    def leaked(self, tables: Iterable[Table]) -> int:
        return self.pool.leaked([*(table.blocks for table in tables), self.offers.blocks()])

    def _allocate(self, count: int) -> list[int]:
        blocks, evicted = self.pool.allocate(count)
        self._forget(evicted)
        return blocks

    def _forget(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.offers.let_go(block)
        if blocks:  # told at once: a reservation may evict as many pages as its prompt has
            self._tell(KvEvicted(b"".join([self._index.forget(block) for block in blocks])))

    def _offer(self, table: Table, ordinal: int, page: PageKey) -> None:
        """A page that entered the index."""
        if not self.offers.limit:
            return
        named = (page.unit_keys, page.fingerprint, page.tokens, page.parent)
        offered = OfferedPage(table.blocks[ordinal], *named, table.chain.tenant, ordinal)
        if ordinal < table.received:
            self.offers.keep_back(offered)
            return
        for each in reversed([offered, *self._kept_back_before(offered.block)]):
            self.offers.wait(each)

    def _kept_back_before(self, block: int) -> Iterator[OfferedPage]:
        """From the end of its chain on. Ends at a page that was not kept back: those before it were not either."""
        before = self._index.before(block)
        while before is not None and (page := self.offers.let_go(before)) is not None:
            yield page
            before = self._index.before(before)

    def _touch_what_lies_before(self, blocks: Sequence[int]) -> None:
        """Blocks that were cached just now came later than the beginning of their chains, which must not be evicted before them."""
        fresh = set(blocks)
        for block in blocks:
            before = self._index.before(block)
            while before is not None and before not in fresh:
                self.pool.touch(before)
                before = self._index.before(before)

    def _offer_waiting(self) -> None:
        """Puts pages on offer as far as the limit goes; those that were evicted meanwhile are skipped."""
        while (page := self.offers.next_waiting()) is not None:
            if self._index.holds(page.block, page.unit_keys, page.fingerprint, page.tokens):
                self.pool.share([page.block])
                self.offers.begin(page)
            else:
                self.offers.skip()

    def _release(self, blocks: Sequence[int]) -> None:
        self.pool.release(blocks, [block in self._index for block in blocks])

    def _tell(self, news: KvStored | KvEvicted) -> None:
        """Neighbours of a kind become one event; stored and evicted keep their order."""
        if self._news and type(self._news[-1]) is type(news):
            news = type(news)(self._news.pop().block_hashes + news.block_hashes)
        self._news.append(news)


__all__ = ["BlockCopy", "BlockTables", "Offers", "PoolExhausted", "Table"]
