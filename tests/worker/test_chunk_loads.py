"""Blended work goes to the engine with the loads of its chunks, which end, or are late, in bounded time."""

from __future__ import annotations

import threading
from array import array

import pytest

from engine.page_protocol import LoadPages, PagesLate, PagesLoaded
from engine.protocol import BlendSpec, ChunkSpan, Dispatch, EngineReady, Submit, Work
from kv_store.page import Page
from kv_transfer.keys import chunk_hashes
from tests.engine.rig import sampling
from tests.kv_store.test_tiered_store import Shelf, content
from tests.worker.test_page_tiers import DEADLINE_S, IDENTITY, LinkTwin, opened_tiers
from worker_runtime.stretches import StretchCutter

CHUNK_TOKENS = (40, 20, 32)
PAGES = [-(-count // 16) for count in CHUNK_TOKENS]
CHUNKS = [array("i", range(100 * at, 100 * at + count)).tobytes() for at, count in enumerate(CHUNK_TOKENS)]


def work(order: tuple[int, ...] = (0, 1, 2)) -> Work:
    ids = array("i", [7]).tobytes()
    spans: list[ChunkSpan] = []
    for number in order:
        spans.append(ChunkSpan(len(ids) // 4, CHUNK_TOKENS[number], chunk_hashes(IDENTITY, CHUNKS[number])))
        ids += CHUNKS[number]
    ids += array("i", [8, 9]).tobytes()
    return Work(
        Dispatch(1, 1), "r", (0, 1), ids, len(ids) // 4, sampling(), b"", 0, tuple(spans), BlendSpec("blend", 0.15, 0)
    )


def pages_of(ready: EngineReady, number: int) -> list[Page]:
    whole = work()
    stretch = StretchCutter(ready).chunk(whole, whole.chunks[number])
    return [Page(each, b"", each.key) for each in stretch.ids]


def shelf_with(link: LinkTwin, *numbers: int) -> Shelf:
    shelf = Shelf()
    for number in numbers:
        pages = pages_of(link.ready, number)
        shelf.write(pages, [content(10 * number + at) for at in range(len(pages))])
    return shelf


def submitted(link: LinkTwin) -> Submit:
    (command,) = [command for command in link.commands if isinstance(command, Submit)]
    return command


@pytest.fixture
async def link() -> LinkTwin:
    return LinkTwin()


async def test_the_work_goes_to_the_engine_with_its_loads_while_they_are_read(link: LinkTwin) -> None:
    shelf, stuck = shelf_with(link, 0, 2), threading.Event()
    shelf.before_read = lambda: (stuck.wait(DEADLINE_S) and None) or None
    tiers = opened_tiers(link, shelf)
    tiers.submit(Submit(work(), "prefill"))
    await link.until(lambda: "Submit" in link.names())
    assert "PagesLoaded" not in link.names()
    opened = {command.block_hashes: command.load_id for command in link.commands if isinstance(command, LoadPages)}
    assert submitted(link).loads == (opened[work().chunks[0].keys], 0, opened[work().chunks[2].keys])
    stuck.set()
    await link.until(lambda: link.names().count("PagesLoaded") == 2)
    ended = {(command.load_id, command.count) for command in link.commands if isinstance(command, PagesLoaded)}
    assert ended == {(opened[work().chunks[0].keys], PAGES[0]), (opened[work().chunks[2].keys], PAGES[2])}
    assert "PagesLate" not in link.names()
    tiers.close()


async def test_a_load_that_is_stuck_is_told_late_at_the_deadline_and_ended_when_it_is_over(link: LinkTwin) -> None:
    shelf, stuck = shelf_with(link, 1), threading.Event()
    shelf.before_read = lambda: (stuck.wait(DEADLINE_S) and None) or None
    tiers = opened_tiers(link, shelf, load_deadline_s=1.0)
    tiers.submit(Submit(work(), "prefill"))
    await link.until(lambda: "PagesLate" in link.names())
    assert submitted(link).loads == (0, 1, 0)
    assert link.commands[-1] == PagesLate(1)
    assert "PagesLoaded" not in link.names()
    assert tiers.figures.late == 1
    stuck.set()
    await link.until(lambda: "PagesLoaded" in link.names())
    tiers.close()


async def test_a_chunk_that_stands_twice_in_a_prompt_is_loaded_once(link: LinkTwin) -> None:
    tiers = opened_tiers(link, shelf_with(link, 0))
    tiers.submit(Submit(work((0, 1, 0)), "generate"))
    await link.until(lambda: "PagesLoaded" in link.names())
    assert submitted(link).loads == (1, 0, 1)
    assert link.names().count("LoadPages") == 1
    assert bytes(link.arena.blocks(1, 2, 1)) == content(2)[1].tobytes()
    assert tiers.figures.loaded_tokens == {"disk": 16 * PAGES[0]}
    tiers.close()


async def test_a_chunk_of_which_a_page_is_missing_is_not_loaded(link: LinkTwin) -> None:
    shelf = shelf_with(link, 0)
    del shelf.held[pages_of(link.ready, 0)[-1].id.key]
    tiers = opened_tiers(link, shelf)
    tiers.submit(Submit(work(), "generate"))
    await link.until(lambda: "Submit" in link.names())
    assert submitted(link).loads == ()
    assert "LoadPages" not in link.names()
    tiers.close()


async def test_without_room_the_work_goes_on_soon_and_awaits_nothing(link: LinkTwin) -> None:
    tiers = opened_tiers(link, shelf_with(link, 0, 1))
    link.full_for = 10**6
    tiers.submit(Submit(work(), "prefill"))
    await link.until(lambda: "Submit" in link.names())
    assert submitted(link).loads == ()
    assert link.names().count("LoadPages") == link.names().count("PagesLoaded")
    assert tiers.figures.no_room == 2
    tiers.close()


async def test_a_tier_that_breaks_while_it_is_read_ends_the_load_and_the_work_is_submitted_once(link: LinkTwin) -> None:
    shelf = shelf_with(link, 0)
    shelf.before_read = lambda: setattr(shelf, "fails", True)
    tiers = opened_tiers(link, shelf)
    tiers.submit(Submit(work(), "prefill"))
    await link.until(lambda: PagesLoaded(1, 0) in link.commands)
    assert submitted(link).loads == (1, 0, 0)
    assert "PagesLate" not in link.names()
    tiers.close()


async def test_cancels_of_single_choices_go_straight_on_while_pages_are_read(link: LinkTwin) -> None:
    shelf, stuck = shelf_with(link, 0), threading.Event()
    shelf.before_read = lambda: (stuck.wait(DEADLINE_S) and None) or None
    tiers = opened_tiers(link, shelf)
    tiers.submit(Submit(work(), "generate"))
    await link.until(lambda: "LoadPages" in link.names())
    tiers.cancel_choices(Dispatch(1, 1), (1,))
    await link.until(lambda: "Cancel" in link.names())
    assert link.names()[-2:] == ["Submit", "Cancel"]
    assert "PagesLoaded" not in link.names()
    stuck.set()
    await link.until(lambda: "PagesLoaded" in link.names())
    tiers.close()
