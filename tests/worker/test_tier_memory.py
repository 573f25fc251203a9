"""The io process's tiers, host memory over a disk, hold no more memory after ten thousand prompts than after two thousand.

The engine is a twin that offers pages and opens blocks; loads, saves, evictions and the disk's log are the real ones.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from engine.page_protocol import KvOffered, LoadPages, OfferedPage, PagesOpened, PagesSaved
from engine.prefix_index import KeyChain
from engine.protocol import Command, Dispatch, EngineReady, Event, Layout, Submit, Work
from kv_store.open_store import StorePlace, open_store
from kv_store.page import PageFormat
from kv_store.tiered_store import TieredStore
from kv_transfer.arena import Arena
from kv_transfer.keys import chain_hashes, fingerprint_seed
from service_kit.config import StoreConfig
from tests.engine.rig import sampling
from tests.held_memory import held
from worker_runtime.page_tiers import PageTiers
from worker_runtime.task_owner import TaskOwner

PROMPTS, WARM_UP, BATCH = 10_000, 2_000, 10
PAGES, PAGE_TOKENS = 3, 16
IDENTITY = bytes(range(32))
FORMAT = PageFormat(IDENTITY, PAGE_TOKENS, 2, 512)
HOST_BYTES, DISK_BYTES = 200 * FORMAT.size_bytes, 8 << 20
BACK = (30, 200)  # prompts ago: still in host memory, and on the disk alone
ALLOWED_BYTES = 8 << 20  # 1 KiB per prompt
ALLOWED_OBJECTS = 2_000  # one per four prompts

pytestmark = pytest.mark.slow


class ForgetfulLink:
    """An engine that opens blocks for every load and keeps no command. Half of its blocks are for loads, half for offers."""

    def __init__(self) -> None:
        layout = Layout(FORMAT.layers, 2 * BATCH * PAGES, PAGE_TOKENS, 1, 8, "float32", FORMAT.block_bytes)
        self.ready = EngineReady("m", IDENTITY, layout, 1000, (2,), 1, 0.0)
        self.arena = Arena.anonymous(layout)
        self.saved_blocks = self.submitted = 0
        self.tiers: PageTiers | None = None
        self._news = asyncio.Event()

    def send(self, command: Command) -> None:
        match command:
            case LoadPages():
                assert self.tiers is not None
                first = (BATCH + command.load_id % BATCH) * PAGES
                opened = PagesOpened(command.load_id, 0, tuple(range(first, first + PAGES)))
                asyncio.get_running_loop().call_soon(self.tiers.opened, opened)
            case PagesSaved():
                self.saved_blocks += len(command.blocks)
            case Submit():
                self.submitted += 1
        self._news.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not holds():
                self._news.clear()
                await self._news.wait()

    async def events(self) -> AsyncIterator[Event]:
        return
        yield

    async def close(self) -> None: ...


def tokens(number: int) -> array[int]:
    return array("i", [number, *range(PAGES * PAGE_TOKENS)])


def work(key: int, number: int) -> Work:
    ids = tokens(number).tobytes()
    return Work(Dispatch(key, 1), f"r{key}", (0,), ids, len(tokens(number)), sampling(), chain_hashes(IDENTITY, ids))


def offer(number: int) -> KvOffered:
    """The pages of a prompt that was computed, in its place of the arena."""
    chain = KeyChain(PAGE_TOKENS, work(0, number).block_hashes, fingerprint_seed(IDENTITY))
    first, parent, offered = number % BATCH * PAGES, b"", []
    for block, page in enumerate(chain.pages(tokens(number), PAGES), first):
        offered.append(OfferedPage(block, page.unit_keys, page.fingerprint, page.tokens, parent))
        parent = page.key
    return KvOffered(tuple(offered), skipped=0)


async def batch(link: ForgetfulLink, tiers: PageTiers, store: TieredStore, first: int) -> None:
    """Computes prompts, whose pages go down to the disk, and asks for earlier ones, whose pages come up."""
    saved, submitted = link.saved_blocks, link.submitted
    for number in range(first, first + BATCH):
        tiers.offered(offer(number))
    await link.until(lambda: link.saved_blocks == saved + BATCH * PAGES)
    assert await asyncio.to_thread(store.settle, time.monotonic() + 60)
    for number in range(first, first + BATCH):
        tiers.submit(Submit(work(number, max(0, number - BACK[number % len(BACK)])), "prefill"))
    await link.until(lambda: link.submitted == submitted + BATCH)


async def test_ten_thousand_prompts_leave_nothing_behind_but_what_the_tiers_may_hold(tmp_path: Path) -> None:
    link = ForgetfulLink()
    config = StoreConfig(host_bytes=HOST_BYTES, disk_bytes=DISK_BYTES)
    store = open_store(config, StorePlace(tmp_path / "disk"), FORMAT, lambda tier: lambda change, pages: None)
    tiers = link.tiers = PageTiers(store, link, config, TaskOwner(), lambda key: False)
    for first in range(0, PROMPTS, BATCH):
        if first == WARM_UP:
            bytes_before, objects_before = held()
        await batch(link, tiers, store, first)
    bytes_after, objects_after = held()
    assert bytes_after - bytes_before < ALLOWED_BYTES
    assert objects_after - objects_before < ALLOWED_OBJECTS
    assert sum(file.stat().st_size for file in (tmp_path / "disk").rglob("*") if file.is_file()) <= DISK_BYTES
    assert min(tiers.figures.loaded_tokens[tier] for tier in ("host", "disk")) > PROMPTS
    tiers.close()
