"""Pool, prefix index and block tables together: no operation loses a block, shares a wrong one or writes a shared one."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_tables import STORED_AT_ONCE, BlockTables, Table
from engine.pool import BlockPool, PoolExhausted
from engine.prefix_index import KeyChain, PrefixIndex
from engine.protocol import KvEvicted, KvStored
from kv_transfer.keys import HASH_BYTES, chain_hashes

ROOT = bytes(32)


def tokens_of(*values: int) -> array[int]:
    return array("i", values)


def chain(tokens: array[int], page_tokens: int = 16, given_units: int | None = None) -> KeyChain:
    """`given_units`: how many keys came with the work; the others are chained on."""
    hashes = chain_hashes(ROOT, tokens.tobytes())
    return KeyChain(page_tokens, hashes if given_units is None else hashes[: given_units * HASH_BYTES], seed=9)


@pytest.mark.parametrize("page_tokens", [16, 32, 64])
@given(length=st.integers(16, 300), given_units=st.integers(1, 12))
def test_page_keys_are_the_chained_keys_whatever_came_with_the_work(
    page_tokens: int, length: int, given_units: int
) -> None:
    tokens = array("i", range(length))
    pages = chain(tokens, page_tokens, given_units).pages(tokens, length // page_tokens)
    units = page_tokens // 16 * (length // page_tokens)
    assert b"".join(page.unit_keys for page in pages) == chain_hashes(ROOT, tokens.tobytes())[: units * HASH_BYTES]


def test_without_a_key_there_is_nothing_to_look_up() -> None:
    tokens = array("i", range(40))
    assert KeyChain(16, b"", 9).pages(tokens, 2) == []


def test_equal_keys_over_other_tokens_are_a_miss() -> None:
    """A collision or a mix-up of keys must not give another prompt's KV."""
    one, other = array("i", range(16)), array("i", range(100, 116))
    index = PrefixIndex()
    (page,) = chain(one).pages(one, 1)
    index.store(5, page)
    forged = KeyChain(16, chain_hashes(ROOT, one.tobytes()), seed=9)
    assert index.lookup([page]) == [5]
    assert index.lookup(forged.pages(other, 1)) == []


def test_a_pool_gives_all_or_nothing_and_raises_the_generation_at_each_reuse() -> None:
    pool = BlockPool(3)
    blocks, _ = pool.allocate(2)
    with pytest.raises(PoolExhausted):
        pool.allocate(2)
    assert pool.available == 1
    before = [pool.generation(block) for block in blocks]
    pool.release(blocks, [False, False])
    again, _ = pool.allocate(3)
    assert [pool.generation(block) for block in blocks] == [number + 1 for number in before]
    assert sorted(again) == [0, 1, 2]


def test_blocks_taken_together_are_neighbours_where_the_pool_allows_it() -> None:
    pool = BlockPool(8)
    for blocks in [pool.allocate(4)[0], pool.allocate(4)[0]]:
        pool.release(blocks, [True] * 4)
    assert pool.allocate(4) == ([0, 1, 2, 3], [3, 2, 1, 0])


def test_the_oldest_cached_block_goes_first_and_the_end_of_a_chain_before_its_beginning() -> None:
    tables = BlockTables(BlockPool(6), 16)
    first, second = array("i", range(48)), array("i", range(1000, 1048))
    for tokens in (first, second):
        table = tables.open(tokens, chain(tokens), 0, 0)
        assert table is not None
        tables.store(table, tokens, 48)
        tables.close(table)
    tables.take_news()
    fresh = tables.open(array("i", range(5000, 5032)), chain(array("i", range(5000, 5032))), 0, 0)
    assert fresh is not None
    evicted = b"".join(news.block_hashes for news in tables.take_news() if isinstance(news, KvEvicted))
    keys = chain_hashes(ROOT, first.tobytes())
    assert {evicted[:HASH_BYTES], evicted[HASH_BYTES:]} == {keys[2 * HASH_BYTES :], keys[HASH_BYTES : 2 * HASH_BYTES]}
    kept = tables.open(first, chain(first), 47, 0)
    assert kept is not None
    assert kept.stored == 1


def test_a_page_that_left_and_came_back_to_its_block_is_offered_once() -> None:
    tables = BlockTables(BlockPool(3), 16)
    tables.offers.limit = 1
    tokens = array("i", range(32))
    opened = [tables.open(tokens, chain(tokens), 32, 0)]
    for _ in range(2):
        assert opened[-1] is not None
        tables.store(opened[-1], tokens, 32)
        tables.close(opened[-1])
        tables.clear_cached()  # the second page leaves; the first one is on offer
        opened.append(tables.open(tokens, chain(tokens), 32, 0))
    last = opened[-1]
    assert last is not None
    tables.store(last, tokens, 32)
    tables.offers.limit = 3
    tables.saved([last.blocks[0]])
    assert tables.offers.blocks() == [last.blocks[1]]
    tables.saved([last.blocks[1]])
    assert tables.leaked([last]) == 0


def test_pages_that_are_saved_after_their_table_was_closed_leave_before_the_beginning_of_their_chain() -> None:
    tables = BlockTables(BlockPool(6), 16)
    tables.offers.limit = 6
    tokens = array("i", range(96))
    table = tables.open(tokens, chain(tokens), 0, 0)
    assert table is not None
    blocks = list(table.blocks)
    tables.store(table, tokens, 96)
    tables.saved(blocks[:2])
    tables.close(table)
    tables.saved(blocks[2:4])
    tables.saved(blocks[4:])
    assert tables.open(array("i", range(5000, 5048)), chain(array("i", range(5000, 5048))), 0, 0) is not None
    again = tables.open(tokens[:48], chain(tokens), 48, 0)
    assert again is not None
    assert again.stored == 3


def test_a_shared_tail_is_copied_before_it_is_written_and_the_last_holder_writes_in_place() -> None:
    tables = BlockTables(BlockPool(8), 16)
    tokens = array("i", range(20))
    table = tables.open(tokens, chain(tokens), 0, 0)
    assert table is not None
    fork = tables.fork(table)
    assert not tables.has_room(fork, 20)
    copy = tables.make_room(fork, 20)
    assert copy is not None
    assert (copy.source, copy.target) == (table.blocks[1], fork.blocks[1])
    assert tables.has_room(fork, 20)
    assert tables.has_room(table, 20)
    assert not tables.has_room(table, 32)
    assert tables.make_room(table, 32) is None
    assert tables.leaked([table, fork]) == 0


def test_a_table_that_would_eat_the_head_room_is_not_opened() -> None:
    tables = BlockTables(BlockPool(4), 16)
    tokens = array("i", range(48))
    assert tables.open(tokens, chain(tokens), 0, 2) is None
    assert tables.pool.available == 4
    assert tables.open(tokens, chain(tokens), 0, 1) is not None


def test_pages_that_can_wait_are_stored_a_few_at_a_time_and_what_is_left_when_their_table_closes() -> None:
    pages = 2 * STORED_AT_ONCE + 5
    tables = BlockTables(BlockPool(pages), 16)
    tokens = array("i", range(16 * pages))
    table = tables.open(tokens, chain(tokens), 0, 0)
    assert table is not None
    tables.store_later(table, tokens, len(tokens))
    told = [stored_pages(tables)]
    assert tables.store_some()
    told.append(stored_pages(tables))
    tables.close(table)
    told.append(stored_pages(tables))
    assert told == [0, STORED_AT_ONCE, pages - STORED_AT_ONCE]
    assert not tables.store_some()
    again = tables.open(tokens, chain(tokens), len(tokens), 0)
    assert again is not None
    assert again.stored == pages


def test_a_lookup_makes_no_keys_beyond_the_first_page_that_is_not_there() -> None:
    tables = BlockTables(BlockPool(20), 16)
    tokens = array("i", range(160))
    first = tables.open(tokens[:48], chain(tokens), 0, 0)
    assert first is not None
    tables.store(first, tokens, 48)
    second = tables.open(tokens, chain(tokens), 160, 0)
    assert second is not None
    assert second.stored == 3
    assert len(second.chain._pages) == 4


def received_prompt(tables: BlockTables, tokens: array[int]) -> Table:
    """A table for `tokens`, of whose prompt, all but the last 16 tokens, the KV came from a peer."""
    table = tables.open(tokens, chain(tokens), len(tokens), 0)
    assert table is not None
    table.received = len(tokens) // 16 - 1
    tables.store(table, tokens, len(tokens) - 16)
    return table


def offered_ordinals(tables: BlockTables) -> list[int]:
    return [page.ordinal for page in tables.offers.take()[0]]


def test_received_pages_are_offered_once_a_page_that_was_computed_here_follows_them() -> None:
    tables = BlockTables(BlockPool(4), 16)
    tables.offers.limit = 4
    tokens = array("i", range(64))
    table = received_prompt(tables, tokens)
    assert offered_ordinals(tables) == []
    tables.store(table, tokens, 64)
    assert offered_ordinals(tables) == [0, 1, 2, 3]
    assert sorted(tables.offers.blocks()) == sorted(table.blocks)


def test_received_pages_are_offered_where_another_sequence_goes_on_behind_them() -> None:
    tables = BlockTables(BlockPool(8), 16)
    tables.offers.limit = 8
    tokens = array("i", range(64))
    tables.close(received_prompt(tables, tokens))
    other = array("i", [*range(48), *range(900, 916)])
    table = tables.open(other, chain(other), 48, 0)
    assert table is not None
    tables.store(table, other, 64)
    assert offered_ordinals(tables) == [0, 1, 2, 3]


def test_of_two_that_received_a_prompt_the_pages_in_the_index_are_offered_when_either_goes_on() -> None:
    tables = BlockTables(BlockPool(8), 16)
    tables.offers.limit = 8
    tokens = array("i", range(64))
    second = tables.open(tokens, chain(tokens), 0, 0)
    first = received_prompt(tables, tokens)
    assert second is not None
    second.received = 3
    tables.store(second, tokens, 64)
    assert offered_ordinals(tables) == [0, 1, 2, 3]
    assert tables.offers.blocks()
    assert set(tables.offers.blocks()) == {*first.blocks[:3], second.blocks[3]}


def test_received_pages_that_were_evicted_are_not_offered_and_neither_is_what_takes_their_blocks() -> None:
    tables = BlockTables(BlockPool(4), 16)
    tables.offers.limit = 4
    tokens = array("i", range(64))
    tables.close(received_prompt(tables, tokens))
    tables.clear_cached()
    other = array("i", range(900, 964))
    table = tables.open(other, chain(other), 0, 0)
    assert table is not None
    tables.store(table, other, 64)
    offered, skipped = tables.offers.take()
    assert [page.unit_keys for page in offered] == [page.unit_keys for page in table.chain.pages(other, 4)]
    assert skipped == 0


def stored_pages(tables: BlockTables) -> int:
    """Told since the last call."""
    return sum(len(news.block_hashes) // HASH_BYTES for news in tables.take_news() if isinstance(news, KvStored))


class AnyOrder(RuleBasedStateMachine):
    """Random tables over a small pool, with the content of each block kept beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = BlockTables(BlockPool(12), 16)
        self.live: list[tuple[Table, array[int], int]] = []
        self.content: dict[int, tuple[int, ...]] = {}  # what was last written to a block
        self.indexed: set[bytes] = set()
        self.tables.offers.limit = 3
        self.offered: dict[int, tuple[int, ...]] = {}  # block -> the content it was offered with

    @precondition(lambda self: self.offered)
    @rule(which=st.integers(0, 99))
    def save(self, which: int) -> None:
        block = list(self.offered)[which % len(self.offered)]
        del self.offered[block]
        self.tables.saved([block, 11])  # unknown blocks change nothing, unless they are on offer
        self.offered.pop(11, None)

    @rule()
    def store_some(self) -> None:
        self.tables.store_some()

    @rule(
        prompt=st.integers(0, 2),
        length=st.integers(1, 70),
        computed=st.integers(0, 70),
        later=st.booleans(),
        received=st.integers(0, 4),
    )
    def open(self, prompt: int, length: int, computed: int, later: bool, received: int) -> None:
        tokens = array("i", range(prompt * 1000, prompt * 1000 + length))
        table = self.tables.open(tokens, chain(tokens), length - 1, 0)
        if table is None:
            return
        for page in range(table.stored):
            assert self.content[table.blocks[page]] == tuple(tokens[page * 16 : page * 16 + 16])
        done = max(table.stored * 16, min(computed, length))
        for page in range(table.stored, len(table.blocks)):
            self.content[table.blocks[page]] = tuple(tokens[page * 16 : min(page * 16 + 16, done)])
        table.received = received
        store = self.tables.store_later if later else self.tables.store
        store(table, tokens, done)
        self.live.append((table, tokens, done))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99))
    def close(self, which: int) -> None:
        table, _, _ = self.live.pop(which % len(self.live))
        self.tables.close(table)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99), token=st.integers(0, 3))
    def fork_and_write(self, which: int, token: int) -> None:
        table, tokens, done = self.live[which % len(self.live)]
        if done != len(tokens):
            return
        fork, longer = self.tables.fork(table), array("i", [*tokens, 9000 + token])
        if not self.tables.has_room(fork, done):
            try:
                copy = self.tables.make_room(fork, done)
            except PoolExhausted:
                self.tables.close(fork)
                return
            if copy is not None:
                self.content[copy.target] = self.content[copy.source]
        block = fork.blocks[done // 16]
        self.content[block] = (
            (*self.content.get(block, ())[: done % 16], 9000 + token) if done % 16 else (9000 + token,)
        )
        self.tables.store(fork, longer, done + 1)
        self.live.append((fork, longer, done + 1))

    @rule()
    def clear(self) -> None:
        self.tables.clear_cached()

    @invariant()
    def nothing_is_lost_and_every_table_holds_its_own_tokens(self) -> None:
        assert self.tables.leaked(table for table, _, _ in self.live) == 0
        for table, tokens, done in self.live:
            for page in range(done // 16):
                assert self.content[table.blocks[page]] == tuple(tokens[page * 16 : page * 16 + 16])

    @invariant()
    def what_is_on_offer_keeps_its_content_and_its_bound(self) -> None:
        fresh, _ = self.tables.offers.take()
        self.offered |= {page.block: self.content[page.block] for page in fresh}
        assert sorted(self.tables.offers.blocks()) == sorted(self.offered)
        assert len(self.offered) <= 3
        assert all(self.content[block] == content for block, content in self.offered.items())

    @invariant()
    def the_news_add_up_to_the_index(self) -> None:
        for news in self.tables.take_news():
            keys = [news.block_hashes[at : at + HASH_BYTES] for at in range(0, len(news.block_hashes), HASH_BYTES)]
            if isinstance(news, KvStored):
                assert not self.indexed & set(keys)
                self.indexed.update(keys)
            else:
                assert self.indexed >= set(keys)
                self.indexed.difference_update(keys)


TestAnyOrder = AnyOrder.TestCase
