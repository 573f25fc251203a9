"""Owns the blocks opened for pages that the io process loads from its tiers: a table each, until the load has ended. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engine.block_tables import BlockTables, Table
from engine.page_protocol import LoadPages, PagesLoaded, PagesOpened
from engine.prefix_index import KeyChain
from kv_transfer.keys import chunk_seed


@dataclass(frozen=True, slots=True)
class _OpenLoad:
    tokens: array[int]
    table: Table | None  # None: there was no room
    first_page: int


class PageLoads:
    def __init__(self, tables: BlockTables, fingerprint_seed: int) -> None:
        self._tables = tables
        self._fingerprint_seed = fingerprint_seed
        self._open: dict[int, _OpenLoad] = {}
        self._late: set[int] = set()  # of those that are open

    def open(self, command: LoadPages, spare: int) -> PagesOpened | None:
        """All blocks for what is missing, or none. `spare` blocks stay available. None: this load is open already."""
        if command.load_id in self._open:
            return None
        tokens = array("i", command.token_ids)
        pages = len(tokens) // self._tables.page_tokens
        del tokens[pages * self._tables.page_tokens :]
        seed = self._fingerprint_seed if command.content == "prompt" else chunk_seed(self._fingerprint_seed)
        chain = KeyChain(self._tables.page_tokens, command.block_hashes, seed, command.tenant)
        table = self._tables.open(tokens, chain, len(tokens), spare) if command.block_hashes and pages else None
        first_page = table.stored if table is not None else 0
        self._open[command.load_id] = _OpenLoad(tokens, table, first_page)
        if table is None:
            return PagesOpened(command.load_id, 0, ())
        fresh, held = tuple(table.blocks[first_page:]), tuple(table.blocks[:first_page])
        generations = tuple(self._tables.pool.generation(block) for block in fresh)
        return PagesOpened(command.load_id, first_page, fresh, generations, held if command.mode == "lend" else ())

    def coming(self, load_id: int) -> Table | None:
        """The blocks of a load whose pages may still come in time, if it got any."""
        load = self._open.get(load_id) if load_id not in self._late else None
        return load.table if load is not None else None

    def late(self, load_id: int) -> None:
        """Nobody waits for its pages any more. Unknown loads change nothing."""
        if load_id in self._open:
            self._late.add(load_id)

    def end(self, command: PagesLoaded, absorb: Callable[[list[int]], None]) -> None:
        """Good pages enter the index, the other blocks are free again. Unknown loads change nothing."""
        load = self._open.pop(command.load_id, None)
        self._late.discard(command.load_id)
        if load is None or load.table is None:
            return
        table, end = load.table, min(load.first_page + command.count, len(load.table.blocks))
        if end > load.first_page:
            absorb(table.blocks[load.first_page : end].tolist())
            self._tables.store(table, load.tokens, end * self._tables.page_tokens)
        self._tables.close(table)

    def tables(self) -> Iterator[Table]:
        return (load.table for load in self._open.values() if load.table is not None)
