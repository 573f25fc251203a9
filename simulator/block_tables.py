"""Owns block tables: which blocks hold the KV of a sequence, what was written there, and which keys they got."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import xxhash

from engine.protocol import EventSink, KvEvicted, KvStored, Work
from kv_transfer.keys import HASH_BYTES, HASH_UNIT_TOKENS, TOKEN_BYTES, chain_hashes
from simulator.block_pool import BlockPool, PoolExhausted
from simulator.kv_memory import KvMemory


@dataclass(slots=True)
class Table:
    """Blocks of one sequence. `token_count` tokens have their KV; the last of them beyond a full block are in `tail`."""

    blocks: list[int]
    block_hashes: bytes  # keys that came with the work
    token_count: int = 0
    tail: bytearray = field(default_factory=bytearray)
    last_key: bytes = b""  # of the last full block; empty = later blocks cannot be keyed
    content: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)  # of all tokens so far

    def copy(self, blocks: list[int]) -> Table:
        return Table(
            blocks, self.block_hashes, self.token_count, bytearray(self.tail), self.last_key, self.content.copy()
        )


class BlockTables:
    """All tables of one engine over one pool; tells the sink what enters and leaves the prefix index."""

    def __init__(self, pool: BlockPool, page_tokens: int, memory: KvMemory | None, sink: EventSink) -> None:
        self.pool = pool
        self.page_tokens = page_tokens
        self._memory = memory
        self._sink = sink

    def blocks_for(self, token_count: int) -> int:
        return -(-token_count // self.page_tokens)

    def open(self, work: Work, reusable_tokens: int) -> Table:
        """A table for the KV of work.token_ids; at most `reusable_tokens` come from the prefix index, as `token_count` says.

        Raises PoolExhausted; nothing is taken then.
        """
        keys = self._page_keys(work.block_hashes)[: reusable_tokens // self.page_tokens]
        cached = self.pool.lookup(keys)
        self.pool.share(cached)
        try:
            fresh = self.allocate(self.blocks_for(len(work.token_ids) // TOKEN_BYTES) - len(cached))
        except PoolExhausted:
            self.pool.release(cached)
            raise
        table = Table([*cached, *fresh], work.block_hashes)
        if cached:
            table.token_count = len(cached) * self.page_tokens
            table.last_key = keys[len(cached) - 1]
            table.content.update(memoryview(work.token_ids)[: table.token_count * TOKEN_BYTES])
        return table

    def allocate(self, count: int) -> list[int]:
        """Blocks from the pool; what had to leave the index is told. Raises PoolExhausted."""
        blocks = self.pool.allocate(count)
        evicted = self.pool.take_evicted()
        if evicted:
            self._sink.emit(KvEvicted(b"".join(evicted)))
        return blocks

    def write(self, table: Table, token_ids: bytes) -> None:
        """The KV of the next tokens now exists in the table's blocks."""
        if self._memory is not None:
            for block, digest in self._contents(table, token_ids):
                self._memory.write(block, digest)
        self._append(table, token_ids)

    def write_token(self, table: Table, token_id: bytes) -> None:
        """`write` of one decoded token; its bytes appear when its block is full, since only full blocks are ever shared."""
        if len(table.tail) + TOKEN_BYTES == self.page_tokens * TOKEN_BYTES:
            self.write(table, token_id)
            return
        table.tail += token_id
        table.content.update(token_id)
        table.token_count += 1

    def adopt(self, table: Table, token_ids: bytes) -> bool:
        """As `write`, for KV that a peer has written; False if the bytes are not those of the tokens."""
        if self._memory is not None:
            for block, digest in self._contents(table, token_ids):
                if not self._memory.matches(block, digest):
                    return False
        self._append(table, token_ids)
        return True

    def grow(self, table: Table) -> None:
        """Makes room for one more token: a new block at a page border, a private copy of a shared last block. Raises PoolExhausted."""
        ordinal = table.token_count // self.page_tokens
        if ordinal == len(table.blocks):
            table.blocks.extend(self.allocate(1))
        elif self.pool.references(table.blocks[ordinal]) > 1:
            private = self.allocate(1)
            self.pool.release([table.blocks[ordinal]])
            table.blocks[ordinal] = private[0]

    def fork(self, table: Table) -> Table:
        """A second table over the same blocks, copy-on-write."""
        self.pool.share(table.blocks)
        return table.copy(list(table.blocks))

    def close(self, table: Table) -> None:
        self.pool.release(table.blocks)
        table.blocks.clear()

    def clear_cached(self) -> None:
        self.pool.clear_cached()
        evicted = self.pool.take_evicted()
        if evicted:
            self._sink.emit(KvEvicted(b"".join(evicted)))

    def leaked(self, tables: Iterable[Table]) -> int:
        """Blocks that somebody holds though no live table lists them."""
        listed = [table.blocks for table in tables]
        # Equal sums are the normal case and cheap; only a difference is worth the walk over all blocks.
        if sum(map(len, listed)) == self.pool.held_references:
            return 0
        return self.pool.leaked(listed)

    def _append(self, table: Table, token_ids: bytes) -> None:
        stored: list[bytes] = []
        page_bytes = self.page_tokens * TOKEN_BYTES
        pending = bytes(table.tail) + token_ids
        table.content.update(token_ids)
        full, rest = divmod(len(pending), page_bytes)
        ordinal = table.token_count // self.page_tokens
        table.token_count += len(token_ids) // TOKEN_BYTES
        table.tail = bytearray(pending[len(pending) - rest :])
        for page in range(full):
            keys = self._keys_of_page(table, ordinal + page, pending[page * page_bytes : (page + 1) * page_bytes])
            table.last_key = keys[-HASH_BYTES:]
            if keys and self.pool.store(table.blocks[ordinal + page], table.last_key):
                stored.append(keys)
        if stored:
            self._sink.emit(KvStored(b"".join(stored)))

    def _keys_of_page(self, table: Table, ordinal: int, token_ids: bytes) -> bytes:
        length = self.page_tokens // HASH_UNIT_TOKENS * HASH_BYTES
        given = table.block_hashes[ordinal * length : (ordinal + 1) * length]
        if len(given) == length:
            return given
        return chain_hashes(table.last_key, token_ids) if table.last_key else b""

    def _page_keys(self, block_hashes: bytes) -> list[bytes]:
        length = self.page_tokens // HASH_UNIT_TOKENS * HASH_BYTES
        return [block_hashes[end - HASH_BYTES : end] for end in range(length, len(block_hashes) + 1, length)]

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
