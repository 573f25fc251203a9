"""Work waits for its pages only as long as that pays: late, broken and slow tiers cost a bounded delay, never an answer."""

from __future__ import annotations

import asyncio
import threading
from array import array
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from engine.page_protocol import KvOffered, LoadPages, OfferedPage, OfferPages, PagesLoaded, PagesOpened, PagesSaved
from engine.prefix_index import KeyChain
from engine.protocol import Cancel, Command, Dispatch, EngineReady, Event, Layout, Submit, Work
from kv_store.page import Page, PageId
from kv_store.tiered_store import TieredStore
from kv_transfer.arena import Arena
from kv_transfer.keys import chain_hashes, fingerprint_seed
from service_kit.config import StoreConfig
from tests.engine.rig import sampling
from tests.kv_store.test_tiered_store import FORMAT, Shelf, content, host_tier
from worker_runtime.page_tiers import PageTiers
from worker_runtime.task_owner import TaskOwner

BLOCKS, PAGES = 16, 5
IDENTITY = bytes(range(32))
TOKENS = array("i", range(16 * PAGES + 3))
DEADLINE_S = 60.0


class LinkTwin:
    """An engine that opens blocks for every load and remembers its commands."""

    def __init__(self, answers: bool = True) -> None:
        layout = Layout(FORMAT.layers, BLOCKS, 16, 1, 8, "float32", FORMAT.block_bytes)
        self.ready = EngineReady("m", IDENTITY, layout, 1000, (2,), 1, 0.0)
        self.arena = Arena.anonymous(layout)
        self.commands: list[Command] = []
        self.answers = answers
        self.full_for = 0  # so many loads find no room
        self.tiers: PageTiers | None = None
        self._news = asyncio.Event()

    def send(self, command: Command) -> None:
        self.commands.append(command)
        if isinstance(command, LoadPages) and self.answers and self.tiers is not None:
            pages = len(command.token_ids) // 64 if not self.full_for else 0
            self.full_for = max(0, self.full_for - 1)
            asyncio.get_running_loop().call_soon(
                self.tiers.opened, PagesOpened(command.load_id, 0, tuple(range(pages)))
            )
        self._news.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not holds():
                self._news.clear()
                await self._news.wait()

    def names(self) -> list[str]:
        return [type(command).__name__ for command in self.commands]

    async def events(self) -> AsyncIterator[Event]:
        return
        yield

    async def close(self) -> None: ...


def work(key: int = 1) -> Work:
    ids = TOKENS.tobytes()
    return Work(Dispatch(key, 1), "r", (0, 1), ids, len(TOKENS), sampling(), chain_hashes(IDENTITY, ids))


def stored_pages() -> list[Page]:
    keys = KeyChain(16, work().block_hashes, fingerprint_seed(IDENTITY)).pages(TOKENS, PAGES)
    return [Page(PageId(key.key, key.fingerprint, key.tokens), b"", key.unit_keys) for key in keys]


@pytest.fixture
async def link() -> LinkTwin:
    return LinkTwin()


def opened_tiers(link: LinkTwin, shelf: Shelf, load_deadline_s: float = DEADLINE_S) -> PageTiers:
    store = TieredStore(host_tier(8), [shelf], FORMAT.size_bytes)
    config = StoreConfig(load_deadline_s=load_deadline_s)
    link.tiers = PageTiers(store, link, config, TaskOwner(), lambda key: False)
    return link.tiers


def full_shelf() -> Shelf:
    shelf = Shelf()
    shelf.write(stored_pages(), [content(number) for number in range(PAGES)])
    return shelf


async def test_pages_are_loaded_into_the_opened_blocks_before_the_work_is_submitted(link: LinkTwin) -> None:
    tiers = opened_tiers(link, full_shelf())
    tiers.submit(Submit(work(), "prefill"))
    await link.until(lambda: "Submit" in link.names())
    assert link.names() == ["OfferPages", "LoadPages", "PagesLoaded", "Submit"]
    assert PagesLoaded(1, PAGES) in link.commands
    assert bytes(link.arena.blocks(2, 3, 1)) == content(3)[2].tobytes()
    assert tiers.figures.loaded_tokens == {"disk": 16 * PAGES}
    tiers.close()


async def test_a_pool_that_is_full_for_a_moment_is_asked_again(link: LinkTwin) -> None:
    tiers = opened_tiers(link, full_shelf())
    link.full_for = 2
    tiers.submit(Submit(work(), "prefill"))
    await link.until(lambda: "Submit" in link.names())
    assert link.names().count("LoadPages") == 3
    assert tiers.figures.loaded_tokens == {"disk": 16 * PAGES}
    assert tiers.figures.no_room == 0
    tiers.close()


async def test_without_room_the_work_goes_on_soon(link: LinkTwin) -> None:
    tiers = opened_tiers(link, full_shelf())
    link.full_for = 10**6
    tiers.submit(Submit(work(), "prefill"))
    await link.until(lambda: "Submit" in link.names())
    assert link.names().count("LoadPages") == link.names().count("PagesLoaded")
    assert tiers.figures.no_room == 1
    tiers.close()


async def test_without_a_stored_page_the_work_goes_straight_on(link: LinkTwin) -> None:
    tiers = opened_tiers(link, Shelf())
    tiers.submit(Submit(work(), "generate"))
    await link.until(lambda: "Submit" in link.names())
    assert "LoadPages" not in link.names()
    tiers.close()


async def test_a_stuck_read_delays_the_work_to_the_deadline_and_its_blocks_until_it_is_over(link: LinkTwin) -> None:
    shelf, stuck = full_shelf(), threading.Event()
    tiers = opened_tiers(link, shelf, load_deadline_s=1.0)
    shelf.before_read = lambda: (stuck.wait(DEADLINE_S) and None) or None
    tiers.submit(Submit(work(), "prefill"))
    await link.until(lambda: "Submit" in link.names())
    assert "PagesLoaded" not in link.names()
    stuck.set()
    await link.until(lambda: "PagesLoaded" in link.names())
    assert tiers.figures.late == 1
    tiers.close()


async def test_a_medium_that_does_not_even_answer_delays_the_work_to_the_deadline(link: LinkTwin) -> None:
    shelf, stuck = full_shelf(), threading.Event()
    tiers = opened_tiers(link, shelf, load_deadline_s=0.05)
    shelf.before_look = lambda: stuck.wait(DEADLINE_S)
    tiers.submit(Submit(work(), "prefill"))
    await link.until(lambda: "Submit" in link.names())
    assert "LoadPages" not in link.names()
    assert tiers.figures.late == 1
    stuck.set()
    tiers.close()


async def test_an_engine_that_opens_nothing_is_waited_for_no_longer_than_the_deadline() -> None:
    link = LinkTwin(answers=False)
    tiers = opened_tiers(link, full_shelf(), load_deadline_s=0.05)
    tiers.submit(Submit(work(), "prefill"))
    await link.until(lambda: "Submit" in link.names())
    tiers.opened(PagesOpened(1, 0, (1, 2)))  # late: the blocks go back unused
    assert link.commands[-1] == PagesLoaded(1, 0)
    tiers.close()


async def test_a_tier_that_breaks_while_it_is_read_gives_what_it_gave(link: LinkTwin) -> None:
    shelf = full_shelf()
    shelf.before_read = lambda: setattr(shelf, "fails", True)
    tiers = opened_tiers(link, shelf)
    tiers.submit(Submit(work(), "prefill"))
    await link.until(lambda: "Submit" in link.names())
    assert PagesLoaded(1, 0) in link.commands
    tiers.close()


async def test_cancels_of_single_choices_follow_the_submit_that_waits(link: LinkTwin) -> None:
    shelf, stuck = full_shelf(), threading.Event()
    shelf.before_read = lambda: (stuck.wait(DEADLINE_S) and None) or None
    tiers = opened_tiers(link, shelf)
    tiers.submit(Submit(work(), "generate"))
    await link.until(lambda: "LoadPages" in link.names())
    tiers.cancel_choices(Dispatch(1, 1), (1,))
    assert "Cancel" not in link.names()
    stuck.set()
    await link.until(lambda: "Cancel" in link.names())
    assert link.names()[-2:] == ["Submit", "Cancel"]
    tiers.cancel_choices(Dispatch(1, 1), (0,))
    assert link.commands[-1] == Cancel(Dispatch(1, 1), (0,))
    tiers.close()


async def test_pages_that_are_computed_faster_than_loaded_are_computed(link: LinkTwin) -> None:
    tiers = opened_tiers(link, full_shelf())
    tiers.computes(1e-9)
    tiers.submit(Submit(work(), "prefill"))
    await link.until(lambda: "Submit" in link.names())
    assert "LoadPages" not in link.names()
    assert tiers.figures.not_worth_it == 1
    tiers.close()


async def test_offered_pages_go_down_and_their_blocks_come_back(link: LinkTwin) -> None:
    shelf = Shelf()
    tiers = opened_tiers(link, shelf)
    assert link.commands == [OfferPages(BLOCKS // 4)]
    keys = KeyChain(16, work().block_hashes, fingerprint_seed(IDENTITY)).pages(TOKENS, 2)
    link.arena.blocks(1, 7, 1)[:] = bytes(range(64))
    offered = (OfferedPage(7, keys[0].unit_keys, keys[0].fingerprint, keys[0].tokens, b"", b"tenant"),)
    tiers.offered(KvOffered(offered, skipped=3))
    await link.until(lambda: "PagesSaved" in link.names())
    assert link.commands[-1] == PagesSaved((7,))
    assert tiers.figures.offers_skipped == 3
    tiers.close()
    assert shelf.held[keys[0].key][1].tobytes() == bytes(range(64))
    assert shelf.tenants == {b"tenant"}


async def test_an_offered_page_saves_its_compute_by_its_place_less_its_load_and_nothing_known_before_a_measurement(
    link: LinkTwin,
) -> None:
    link.ready = msgspec.structs.replace(link.ready, token_growth=0.5 / 16)  # per page half of what the first one takes
    store = TieredStore(host_tier(8), [shelf := Shelf()], FORMAT.size_bytes)
    store.speeds["disk"].measured(1, 0.001)
    tiers = link.tiers = PageTiers(store, link, StoreConfig(), TaskOwner(), lambda key: False)
    keys = KeyChain(16, work().block_hashes, fingerprint_seed(IDENTITY)).pages(TOKENS, PAGES)
    for token_s, ordinals in ((0.0, (2,)), (0.001, (1, 3))):
        tiers.computes(token_s)
        chosen = [(at, keys[at]) for at in ordinals]
        pages = [OfferedPage(7, key.unit_keys, key.fingerprint, key.tokens, key.parent, b"", at) for at, key in chosen]
        tiers.offered(KvOffered(tuple(pages), 0))
    await link.until(lambda: link.names().count("PagesSaved") == 2)
    tiers.close()
    savings = [shelf.savings[keys[at].key] for at in (1, 2, 3)]
    assert savings == pytest.approx([0.016 * 1.5 / 2.0 - 0.001, 0.0, 0.016 * 2.5 / 2.0 - 0.001])
