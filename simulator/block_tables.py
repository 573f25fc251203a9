"""Owns what a modelled engine writes to its tables (those of `engine.block_tables`): which tokens have their KV, and its bytes."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import xxhash

from engine import block_tables
from engine.pool import BlockPool
from engine.prefix_index import KeyChain
from engine.protocol import EventSink, Work
from kv_transfer.keys import TOKEN_BYTES
from simulator.kv_memory import KvMemory


@dataclass(slots=True)
class Table:
    """Blocks of one sequence, and the tokens (int32) whose KV is in them."""

    held: block_tables.Table
    tokens: array[int]
    content: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)  # of all tokens so far

    @property
    def blocks(self) -> array[int]:
        return self.held.blocks

    @property
    def token_count(self) -> int:
        return len(self.tokens)


class BlockTables:
    """All tables of one engine; tells the sink what enters and leaves the prefix index."""

    def __init__(
        self, pool: BlockPool, page_tokens: int, fingerprint_seed: int, memory: KvMemory | None, sink: EventSink
    ) -> None:
        self.pool = pool
        self.page_tokens = page_tokens
        self._tables = block_tables.BlockTables(pool, page_tokens)
        self._seed = fingerprint_seed
        self._memory = memory
        self._sink = sink

    def blocks_for(self, token_count: int) -> int:
        return self._tables.pages_for(token_count)

    def open(self, work: Work, reusable_tokens: int, spare: int) -> Table | None:
        """A table for the KV of work.token_ids; at most `reusable_tokens` come from the prefix index, as `token_count` says.

        All or nothing: None if it would leave fewer than `spare` blocks available.
        """
        tokens = array("i", work.token_ids)
        chain = KeyChain(self.page_tokens, work.block_hashes, self._seed, work.tenant)
        held = self._tables.open(tokens, chain, reusable_tokens, spare)
        if held is None:
            return None
        self._tell()
        del tokens[held.stored * self.page_tokens :]
        table = Table(held, tokens)
        table.content.update(tokens)
        return table

    def write(self, table: Table, token_ids: bytes) -> None:
        """The KV of the next tokens now exists in the table's blocks."""
        if self._memory is not None:
            for block, digest in self._contents(table, token_ids):
                self._memory.write(block, digest)
        self._append(table, token_ids)

    def write_token(self, table: Table, token_id: bytes) -> None:
        """`write` of one decoded token; its bytes appear when its block is full, since only full blocks are ever shared."""
        if (table.token_count + 1) % self.page_tokens:
            self._append(table, token_id)
        else:
            self.write(table, token_id)

    def adopt(self, table: Table, token_ids: bytes) -> bool:
        """As `write`, for KV that a peer has written; False if the bytes are not those of the tokens."""
        if self._memory is not None:
            for block, digest in self._contents(table, token_ids):
                if not self._memory.matches(block, digest):
                    return False
        self._append(table, token_ids)
        return True

    def grow(self, table: Table) -> None:
        """Makes room for one more token. Raises PoolExhausted."""
        position = table.token_count
        if not self._tables.has_room(table.held, position):
            self._tables.make_room(table.held, position)  # a copied block gets its bytes when it is full
            self._tell()

    def fork(self, table: Table) -> Table:
        """A second table over the same blocks, copy-on-write."""
        return Table(self._tables.fork(table.held), table.tokens[:], table.content.copy())

    def close(self, table: Table) -> None:
        self._tables.close(table.held)

    def clear_cached(self) -> None:
        self._tables.clear_cached()
        self._tell()

    def leaked(self, tables: Iterable[Table]) -> int:
        """Blocks that somebody holds though no live table lists them."""
        return self._tables.leaked(table.held for table in tables)

    # ---- parts

    def _append(self, table: Table, token_ids: bytes) -> None:
        table.tokens.frombytes(token_ids)
        table.content.update(token_ids)
        self._tables.store(table.held, table.tokens, table.token_count)
        self._tell()

    def _tell(self) -> None:
        for news in self._tables.take_news():
            self._sink.emit(news)

    def _contents(self, table: Table, token_ids: bytes) -> Iterable[tuple[int, bytes]]:
        """(block, digest of all tokens up to the end of its content) of each block that `token_ids` reaches."""
        content = table.content.copy()
        view, position = memoryview(token_ids), table.token_count
        end = position + len(token_ids) // TOKEN_BYTES
        start = position
        while position < end:
            ordinal = position // self.page_tokens
            upto = min((ordinal + 1) * self.page_tokens, end)
            content.update(view[(position - start) * TOKEN_BYTES : (upto - start) * TOKEN_BYTES])
            yield table.blocks[ordinal], content.digest()
            position = upto
