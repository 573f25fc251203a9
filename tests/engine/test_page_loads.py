"""Pages leave the engine and come back: offered when final, opened for a load, found by the next prompt, never half loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from engine.block_tables import BlockTables
from engine.kv_exchange import KvExchange
from engine.native import NativeEngine
from engine.page_protocol import KvOffered, LoadPages, OfferedPage, OfferPages, PagesLoaded, PagesOpened, PagesSaved
from engine.pool import BlockPool
from engine.protocol import ClearPrefixCache, Started, Submit
from kv_transfer.keys import chain_hashes
from tests.engine.rig import PROMPT, Recorder, assert_all_free, finish, open_native, sampling, work
from tests.engine.test_kv_memory import LAYOUT, device

PAGES = len(PROMPT) // 16
PAGE_BYTES = 3 * 2 * 16 * 2 * 16 * 4  # layers, k and v, tokens, heads, dimensions, float32


def pool_of(engine: NativeEngine) -> torch.Tensor:
    return engine._memory.pool


def offers(recorder: Recorder) -> list[OfferedPage]:
    return [page for event in recorder.of(KvOffered) for page in event.pages]


def load_command(load_id: int = 1, mode: Literal["load", "lend"] = "load") -> LoadPages:
    ids = work(9, PROMPT).token_ids
    return LoadPages(load_id, ids, chain_hashes(bytes(32), ids), mode=mode)


def computed_and_saved(engine: NativeEngine, recorder: Recorder) -> dict[bytes, torch.Tensor]:
    """Runs PROMPT once. Bytes of its full pages by key, after which the engine remembers nothing."""
    engine.handle(OfferPages(64))
    engine.handle(Submit(work(1, PROMPT), "generate"))
    finish(engine)
    saved = {page.unit_keys[-32:]: pool_of(engine)[:, page.block].clone() for page in offers(recorder)}
    engine.handle(PagesSaved(tuple(page.block for page in offers(recorder))))
    engine.handle(ClearPrefixCache())
    pool_of(engine).fill_(float("nan"))
    return saved


def test_full_pages_are_offered_once_with_their_keys_and_parents(native: tuple[NativeEngine, Recorder]) -> None:
    engine, recorder = native
    saved = computed_and_saved(engine, recorder)
    pages = offers(recorder)
    keys = chain_hashes(bytes(32), work(1, PROMPT).token_ids)
    assert len(saved) == len(pages) >= PAGES
    assert [page.unit_keys for page in pages[:PAGES]] == [keys[32 * at : 32 * at + 32] for at in range(PAGES)]
    assert [page.parent for page in pages[1:]] == [page.unit_keys for page in pages[:-1]]
    assert pages[0].parent == b""
    assert [page.ordinal for page in pages] == list(range(len(pages)))


def test_without_an_order_nothing_is_offered(native: tuple[NativeEngine, Recorder]) -> None:
    engine, recorder = native
    engine.handle(Submit(work(1, PROMPT), "generate"))
    finish(engine)
    assert not recorder.of(KvOffered)


def test_beyond_the_limit_pages_wait_for_their_turn(native: tuple[NativeEngine, Recorder]) -> None:
    engine, recorder = native
    engine.handle(OfferPages(2))
    engine.handle(Submit(work(1, PROMPT), "generate"))
    finish(engine)
    assert len(offers(recorder)) == 2
    assert engine.load().blocks_leaked == 0
    for taken in range(PAGES + 1):
        engine.handle(PagesSaved(tuple(page.block for page in offers(recorder)[taken:])))
    assert [page.parent for page in offers(recorder)[1:]] == [page.unit_keys for page in offers(recorder)[:-1]]
    assert len(offers(recorder)) >= PAGES
    assert sum(event.skipped for event in recorder.of(KvOffered)) == 0


def test_pages_that_leave_before_their_turn_are_counted(native: tuple[NativeEngine, Recorder]) -> None:
    engine, recorder = native
    engine.handle(OfferPages(2))
    engine.handle(Submit(work(1, PROMPT), "generate"))
    finish(engine)
    first = offers(recorder)
    engine.handle(ClearPrefixCache())
    engine.handle(PagesSaved(tuple(page.block for page in first)))
    assert offers(recorder) == first
    assert sum(event.skipped for event in recorder.of(KvOffered)) >= PAGES - 2


@pytest.mark.parametrize("good", [0, 2, PAGES])
def test_loaded_pages_are_reused_and_the_rest_is_computed(native: tuple[NativeEngine, Recorder], good: int) -> None:
    engine, recorder = native
    saved = computed_and_saved(engine, recorder)
    expected = recorder.tokens(1)
    engine.handle(load_command())
    (opened,) = recorder.of(PagesOpened)
    assert (opened.first_page, len(opened.blocks)) == (0, PAGES)
    for block, content in zip(opened.blocks[:good], saved.values(), strict=False):
        pool_of(engine)[:, block] = content
    engine.handle(PagesLoaded(1, good))
    pool_of(engine)[:, list(set(range(engine.load().blocks_total)) - set(opened.blocks[:good]))] = 0
    engine.handle(Submit(work(2, PROMPT), "generate"))
    finish(engine)
    (started,) = recorder.of(Started, 2)
    assert started.cached_tokens == 16 * good
    assert recorder.tokens(2) == expected
    engine.handle(PagesSaved(tuple(page.block for page in offers(recorder))))


def test_a_load_opens_only_what_the_pool_lacks_and_keeps_the_rest_from_eviction(
    native: tuple[NativeEngine, Recorder],
) -> None:
    engine, recorder = native
    computed_and_saved(engine, recorder)
    pool_of(engine).fill_(0)
    half = PROMPT[: 16 * 2 + 1]
    engine.handle(Submit(work(2, half, sampling(1)), "generate"))
    finish(engine)
    engine.handle(load_command())
    engine.handle(load_command())  # a duplicate has no effect
    (opened,) = recorder.of(PagesOpened)
    assert opened.first_page == 2
    assert len(opened.blocks) == PAGES - 2
    engine.handle(ClearPrefixCache())
    assert engine.load().blocks_leaked == 0
    assert engine.load().blocks_total - engine.load().blocks_free == PAGES
    engine.handle(PagesLoaded(1, 0))
    engine.handle(PagesLoaded(1, 3))  # unknown by now
    engine.handle(PagesSaved(tuple(page.block for page in offers(recorder))))


def test_a_load_for_which_there_is_no_room_opens_nothing(model_dir: Path) -> None:
    engine, recorder = open_native(model_dir, kv_bytes=(PAGES - 1) * PAGE_BYTES)
    engine.handle(load_command())
    assert recorder.of(PagesOpened) == [PagesOpened(1, 0, ())]
    engine.handle(PagesLoaded(1, 0))
    assert_all_free(engine)
    engine.close()


def test_pages_that_are_lent_are_named_and_outlive_the_cache_until_they_come_back(
    native: tuple[NativeEngine, Recorder],
) -> None:
    engine, recorder = native
    engine.handle(Submit(work(1, PROMPT), "generate"))
    finish(engine)
    engine.handle(load_command(mode="lend"))
    (opened,) = recorder.of(PagesOpened)
    assert (opened.first_page, opened.blocks) == (PAGES, ())
    lent = pool_of(engine)[:, list(opened.held)].clone()
    engine.handle(ClearPrefixCache())
    engine.handle(Submit(work(2, [token + 1 for token in PROMPT]), "generate"))
    finish(engine)
    assert torch.equal(pool_of(engine)[:, list(opened.held)], lent)
    assert engine.load().blocks_total - engine.load().blocks_free == PAGES
    engine.handle(PagesLoaded(1, 0))
    assert_all_free(engine)


def test_pages_that_are_lent_enter_the_index_when_they_come_back(native: tuple[NativeEngine, Recorder]) -> None:
    engine, recorder = native
    saved = computed_and_saved(engine, recorder)
    pool_of(engine).fill_(0)
    engine.handle(load_command(mode="lend"))
    (opened,) = recorder.of(PagesOpened)
    assert (opened.held, len(opened.blocks), len(opened.generations)) == ((), PAGES, PAGES)
    for block, content in zip(opened.blocks, saved.values(), strict=False):
        pool_of(engine)[:, block] = content
    engine.handle(PagesLoaded(1, PAGES))
    engine.handle(Submit(work(2, PROMPT), "generate"))
    finish(engine)
    assert recorder.of(Started, 2)[0].cached_tokens == 16 * PAGES
    assert recorder.tokens(2) == recorder.tokens(1)
    engine.handle(PagesSaved(tuple(page.block for page in offers(recorder))))


def test_the_generation_of_an_opened_block_rises_with_each_owner(native: tuple[NativeEngine, Recorder]) -> None:
    engine, recorder = native
    for load_id in (1, 2):
        engine.handle(load_command(load_id))
        engine.handle(PagesLoaded(load_id, 0))
    first, second = recorder.of(PagesOpened)
    owners = dict(zip(first.blocks, first.generations, strict=True))
    assert all(
        generation > owners[block]
        for block, generation in zip(second.blocks, second.generations, strict=True)
        if block in owners
    )
    assert set(owners) & set(second.blocks)


def test_lent_pages_are_told_once_the_arena_holds_them() -> None:
    held, recorder = device(), Recorder()
    tables = BlockTables(BlockPool(LAYOUT.blocks), LAYOUT.page_tokens)
    exchange = KvExchange(tables, held.memory, LAYOUT.layers, 7, recorder)
    exchange.handle(load_command(1), 0)
    (opened,) = recorder.of(PagesOpened)
    exchange.handle(PagesLoaded(1, PAGES), 0)
    held.memory.pool.copy_(torch.randn(held.memory.pool.shape, generator=torch.Generator().manual_seed(3)))
    exchange.handle(load_command(2, "lend"), 0)
    assert len(recorder.of(PagesOpened)) == 1
    held.memory.settle()
    lent = recorder.of(PagesOpened)[-1]
    assert lent.held == opened.blocks
    assert torch.equal(held.arena[:, list(lent.held)], held.memory.pool[:, list(lent.held)])
    exchange.handle(PagesLoaded(2, 0), 0)
    assert tables.pool.held == 0
    held.memory.close()
