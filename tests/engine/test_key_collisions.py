"""Keys so short that different pages get the same one: the device's index gives each prompt its own pages or none."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_tables import BlockTables, Table
from engine.page_loads import PageLoads
from engine.page_protocol import LoadPages, PagesLoaded
from engine.pool import BlockPool
from engine.prefix_index import KeyChain, PrefixIndex
from engine.protocol import KvEvicted, KvStored
from kv_transfer.keys import HASH_BYTES, chain_hashes, chunk_hashes, chunk_seed
from tests.kv_transfer.short_keys import WHOLE_FINGERPRINT, shortened_keys

ROOT, SEED, PAGE_TOKENS = bytes(32), 9, 16
# A prompt is a list of pages, each of one token over and over: equal lists begin with equal pages, all others differ.
PROMPTS = st.lists(st.integers(0, 30), min_size=1, max_size=6)
Prefix = tuple[int, ...]


@pytest.fixture
def eight_bits() -> Iterator[None]:
    with shortened_keys(8):
        yield


def tokens_of(prompt: list[int] | Prefix) -> array[int]:
    return array("i", [page for page in prompt for _ in range(PAGE_TOKENS)])


def chain(prompt: list[int] | Prefix) -> KeyChain:
    return KeyChain(PAGE_TOKENS, chain_hashes(ROOT, tokens_of(prompt).tobytes()), SEED)


def key_of(prompt: Prefix) -> bytes:
    return chain_hashes(ROOT, tokens_of(prompt).tobytes())[-HASH_BYTES:]


def prefixes(prompt: list[int]) -> list[Prefix]:
    return [tuple(prompt[: end + 1]) for end in range(len(prompt))]


def told_apart(prompt: list[int]) -> list[int]:
    """A prompt like that, none of whose pages has the tokens of a page behind other ones: numbers that name all pages so far."""
    return [sum((page + 1) * 32**at for at, page in enumerate(prompt[: end + 1])) for end in range(len(prompt))]


BUILDS = pytest.mark.parametrize(("fingerprint_bits", "drawn"), [(WHOLE_FINGERPRINT, list), (0, told_apart)])


@BUILDS
@given(
    stored=st.lists(PROMPTS, max_size=40),
    forgotten=st.sets(st.integers(0, 99)),
    asked=st.lists(PROMPTS, min_size=1, max_size=20),
)
@settings(max_examples=150, derandomize=True, deadline=None)
def test_the_index_agrees_with_a_model_that_knows_every_token(
    fingerprint_bits: int,
    drawn: Callable[[list[int]], list[int]],
    stored: list[list[int]],
    forgotten: set[int],
    asked: list[list[int]],
) -> None:
    """The model: whoever comes first has the key; a prompt's longest prefix is found whose every page is its own. Without
    fingerprints, the tokens alone tell pages apart."""
    stored, asked = [drawn(prompt) for prompt in stored], [drawn(prompt) for prompt in asked]
    with shortened_keys(8, fingerprint_bits):
        index, model, collisions = PrefixIndex(), dict[bytes, tuple[int, Prefix]](), 0
        for prompt in stored:
            for page, prefix in zip(chain(prompt).pages(tokens_of(prompt), len(prompt)), prefixes(prompt), strict=True):
                block = len(model)
                assert index.store(block, page) == (page.key not in model)
                model.setdefault(page.key, (block, prefix))
        for block in forgotten:
            for key in [key for key, (held, _) in model.items() if held == block]:
                index.forget(block)
                del model[key]
        for prompt in [*asked, *stored]:
            expected: list[int] = []
            for prefix in prefixes(prompt):
                block, held = model.get(key_of(prefix), (-1, ()))
                if held != prefix:
                    collisions += block >= 0
                    break
                expected.append(block)
            assert index.lookup(chain(prompt).pages(tokens_of(prompt), len(prompt))) == expected
        assert index.collisions == collisions
        assert len(index) == len(model)


class Colliding(RuleBasedStateMachine):
    """Tables over a small pool, with the prefix that each block was computed for beside it, as its content."""

    fingerprint_bits = WHOLE_FINGERPRINT

    def __init__(self) -> None:
        super().__init__()
        self.short = shortened_keys(5, self.fingerprint_bits)
        self.short.__enter__()
        self.tables = BlockTables(BlockPool(14), PAGE_TOKENS)
        self.tables.offers.limit = 2
        self.live: list[Table] = []
        self.content: dict[int, Prefix] = {}
        self.indexed: set[bytes] = set()

    def drawn(self, prompt: list[int]) -> list[int]:
        return prompt

    def teardown(self) -> None:
        self.short.__exit__(None, None, None)

    @rule(prompt=PROMPTS)
    def compute(self, prompt: list[int]) -> None:
        prompt = self.drawn(prompt)
        tokens = tokens_of(prompt)
        table = self.tables.open(tokens, chain(prompt), len(tokens), 0)
        if table is None:
            return
        for page, prefix in enumerate(prefixes(prompt)):
            if page < table.stored:
                assert self.content[table.blocks[page]] == prefix
            self.content[table.blocks[page]] = prefix
        self.tables.store(table, tokens, len(tokens))
        self.live.append(table)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99))
    def close(self, which: int) -> None:
        self.tables.close(self.live.pop(which % len(self.live)))

    @rule(count=st.integers(1, 2))
    def saved(self, count: int) -> None:
        self.tables.saved(self.tables.offers.blocks()[:count])

    @rule()
    def clear(self) -> None:
        self.tables.clear_cached()

    @invariant()
    def what_is_offered_is_what_its_fingerprint_says(self) -> None:
        offered, _ = self.tables.offers.take()
        for page in offered:
            prefix = self.content[page.block]
            (*_, named) = chain(prefix).pages(tokens_of(prefix), len(prefix))
            assert (page.unit_keys, page.fingerprint, page.tokens, page.parent) == (
                named.unit_keys,
                named.fingerprint,
                named.tokens,
                named.parent,
            )

    @invariant()
    def no_block_is_lost_and_the_news_add_up(self) -> None:
        assert self.tables.leaked(self.live) == 0
        for news in self.tables.take_news():
            keys = [news.block_hashes[at : at + HASH_BYTES] for at in range(0, len(news.block_hashes), HASH_BYTES)]
            if isinstance(news, KvStored):
                assert not self.indexed & set(keys)
                self.indexed.update(keys)
            elif isinstance(news, KvEvicted):
                assert self.indexed >= set(keys)
                self.indexed.difference_update(keys)


class CollidingAltogether(Colliding):
    """Without fingerprints."""

    fingerprint_bits = 0

    def drawn(self, prompt: list[int]) -> list[int]:
        return told_apart(prompt)


TestColliding = Colliding.TestCase
TestCollidingAltogether = CollidingAltogether.TestCase
TestColliding.settings = TestCollidingAltogether.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)


def colliding(key: bytes, length: int, first: int = 1000) -> Prefix:
    """A prompt of other tokens whose last page has this key."""
    return next(
        prompt for at in range(10_000) if key_of(prompt := (*range(first, first + length - 1), 5000 + at)) == key
    )


@pytest.mark.usefixtures("eight_bits")
def test_a_page_that_waits_for_its_turn_is_not_offered_with_the_bytes_of_its_namesake() -> None:
    """The namesake came into the same block, under the same key."""
    tables = BlockTables(BlockPool(1), PAGE_TOKENS)
    first = (3,)
    other = colliding(key_of(first), 1)
    tables.offers.limit = 1
    for prompt in (first, other):
        table = tables.open(tokens_of(prompt), chain(prompt), PAGE_TOKENS, 0)
        assert table is not None
        if prompt == first:
            tables.offers._held.add(-1)  # another one's turn
        tables.store(table, tokens_of(prompt), PAGE_TOKENS)
        tables.close(table)
        if prompt == first:
            tables.clear_cached()
    tables.offers._held.clear()
    tables.saved([])
    offered, skipped = tables.offers.take()
    (named,) = chain(other).pages(tokens_of(other), 1)
    assert [page.fingerprint for page in offered] == [named.fingerprint]
    assert skipped == 1


@pytest.mark.usefixtures("eight_bits")
def test_pages_that_name_each_other_as_parents_are_no_circle() -> None:
    """Each lies under the key of the other one's parent; a third one leads to them."""
    above, end = (7, 8), (7, 8, 9)
    below = next(
        (first, second)
        for first in range(100, 4000)
        if key_of((first,)) == key_of(above)
        for second in range(100, 4000)
        if key_of((first, second)) == key_of((7,))
    )
    tables = BlockTables(BlockPool(7), PAGE_TOKENS)
    tables.offers.limit = 3
    for prompt in (above, below, end):
        table = tables.open(tokens_of(prompt), chain(prompt), 0, 0)
        assert table is not None
        table.stored = len(prompt) - 1  # as if the pages before had left: only the last one enters the index
        tables.store(table, tokens_of(prompt), len(tokens_of(prompt)))
        tables.close(table)
    for block in tables.offers.blocks():
        tables.saved([block])
    assert tables.pool.available == 7


@pytest.mark.usefixtures("eight_bits")
def test_a_chunk_is_never_taken_for_a_prompt_that_begins_with_the_same_tokens() -> None:
    """The KV of a chunk is kept before its rotation: with equal tokens and equal keys it still is another page."""
    prompt = next(
        prompt
        for first in range(5000)
        if key_of(prompt := (first,)) == chunk_hashes(ROOT, tokens_of(prompt).tobytes())[:HASH_BYTES]
    )
    tables = BlockTables(BlockPool(4), PAGE_TOKENS)
    loads = PageLoads(tables, SEED)
    tokens = tokens_of(prompt)
    of_chunk = chunk_hashes(ROOT, tokens.tobytes())
    assert of_chunk == chain_hashes(ROOT, tokens.tobytes())
    opened = loads.open(LoadPages(1, tokens.tobytes(), of_chunk, content="chunk"), 0)
    assert opened is not None
    loads.end(PagesLoaded(1, 1), lambda blocks: None)
    exact = tables.open(tokens, chain(prompt), PAGE_TOKENS, 0)
    assert exact is not None
    assert exact.stored == 0
    assert tables.key_collisions == 1
    again = tables.open(tokens, KeyChain(PAGE_TOKENS, of_chunk, chunk_seed(SEED)), PAGE_TOKENS, 0)
    assert again is not None
    assert again.stored == 1


def test_a_page_of_another_tenant_under_the_right_key_is_a_miss() -> None:
    """Keys are salted, so that only a mix-up of them gives two tenants the same one: the tokens alone would not tell."""
    tokens = tokens_of((1, 2))
    keys = chain_hashes(ROOT, tokens.tobytes())
    own, other = (KeyChain(PAGE_TOKENS, keys, SEED, tenant) for tenant in (b"a" * 8, b"b" * 8))
    index = PrefixIndex()
    index.store(5, own.pages(tokens, 2)[0])
    assert index.lookup(own.fork().pages(tokens, 2)) == [5]
    assert index.lookup(other.pages(tokens, 2)) == []
    assert index.collisions == 1
