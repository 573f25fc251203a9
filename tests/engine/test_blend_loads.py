"""Blends whose chunks are still being loaded: they begin without them, wait where they read them, and end the same whatever came."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from engine.native import NativeEngine
from engine.page_protocol import (
    KvOffered,
    LoadPages,
    OfferPages,
    PagesLate,
    PagesLoaded,
    PagesOpened,
    PagesSaved,
)
from engine.protocol import BlendSpec, Cancel, ClearPrefixCache, Dispatch, KvReady, ReleaseSource, Started, Submit
from tests.engine.rig import Recorder, assert_all_free, finish, open_native, sampling
from tests.engine.rig import work as exact_work
from tests.engine.test_blend_jobs import CHUNKS, LAYERS, blended, pass_alone, rows

COMING = 1  # the chunk whose pages are loaded
PAGES = -(-len(CHUNKS[COMING]) // 16)
STEPS = 50


@dataclass(frozen=True, slots=True)
class Rig:
    """An engine that has forgotten the chunks, which it computed once. pages: of the chunk that is coming."""

    engine: NativeEngine
    recorder: Recorder
    pages: list[torch.Tensor]

    def load(self, load_id: int) -> PagesOpened:
        span = blended(1).chunks[COMING]
        padded = np.full(16 * PAGES, -1, dtype=np.int32)
        padded[: span.count] = CHUNKS[COMING]
        self.engine.handle(LoadPages(load_id, padded.tobytes(), span.keys, content="chunk"))
        return self.recorder.of(PagesOpened)[-1]

    def write(self, opened: PagesOpened, good: int) -> None:
        """The first `good` pages as they are, the others damaged."""
        for at, block in enumerate(opened.blocks):
            self.engine._memory.pool[:, block] = self.pages[at] if at < good else float("nan")

    def submit(self, key: int, load_id: int, mode: str = "generate") -> None:
        work = msgspec.structs.replace(blended(key), dispatch=Dispatch(key, 1))
        loads = tuple(load_id * (at == COMING) for at in range(len(CHUNKS)))
        self.engine.handle(Submit(work, "prefill" if mode == "prefill" else "generate", loads))

    def rest(self) -> None:
        """Steps until there is nothing to do, or to wait for."""
        for _ in range(STEPS):
            if not self.engine.step():
                return
        raise AssertionError("the engine does not come to rest")

    def assert_blended_as_ever(self, key: int) -> None:
        started = self.recorder.of(Started, key)[0]
        expected, count = pass_alone(self.engine, (0, 1, 2))
        seen = rows(self.engine._memory.pool, list(started.blocks), count)
        assert torch.equal(seen, rows(expected, list(range(len(started.blocks))), count))


@pytest.fixture
def rig(native: tuple[NativeEngine, Recorder]) -> Rig:
    return forgetful(*native)


def forgetful(engine: NativeEngine, recorder: Recorder) -> Rig:
    finish(engine, OfferPages(64), Submit(blended(100), "generate"))
    offered = [page for event in recorder.of(KvOffered) for page in event.pages]
    keys = blended(100).chunks[COMING].keys
    wanted = {keys[at : at + 32] for at in range(0, len(keys), 32)}
    of_chunk = [page for page in offered if page.unit_keys[-32:] in wanted]
    assert [page.ordinal for page in of_chunk] == list(range(PAGES))  # in the chunk, wherever in the prompt that is
    pages = [engine._memory.pool[:, page.block].clone() for page in of_chunk]
    finish(engine, OfferPages(0), PagesSaved(tuple(page.block for page in offered)), ClearPrefixCache())
    recorder.events.clear()
    return Rig(engine, recorder, pages)


def test_the_first_layer_is_computed_while_pages_come_and_the_second_waits_for_them(rig: Rig) -> None:
    opened = rig.load(7)
    rig.submit(1, 7, "prefill")
    rig.rest()
    assert {event.layer for event in rig.recorder.of(KvReady)} == {0}
    rig.write(opened, PAGES)
    rig.engine.handle(PagesLoaded(7, PAGES))
    rig.rest()
    assert {event.layer for event in rig.recorder.of(KvReady)} == set(range(LAYERS))
    rig.assert_blended_as_ever(1)
    finish(rig.engine, ReleaseSource(Dispatch(1, 1)))
    assert_all_free(rig.engine)


@pytest.mark.parametrize("good", [0, 1, PAGES])
@pytest.mark.parametrize("begun", [False, True])
def test_a_blend_is_the_same_however_much_of_a_load_was_good(rig: Rig, good: int, begun: bool) -> None:
    opened = rig.load(7)
    if begun:
        rig.submit(1, 7)
        rig.rest()
    rig.write(opened, good)
    rig.engine.handle(PagesLoaded(7, good))
    if not begun:
        rig.submit(1, 7)
    rig.rest()
    rig.assert_blended_as_ever(1)
    assert_all_free(rig.engine)


@pytest.mark.parametrize("begun", [False, True])
def test_a_late_load_is_not_waited_for_and_what_it_writes_then_hurts_nobody(rig: Rig, begun: bool) -> None:
    opened = rig.load(7)
    if begun:
        rig.submit(1, 7)
        rig.rest()
    rig.engine.handle(PagesLate(7))
    if not begun:
        rig.submit(1, 7)
    for _ in range(STEPS):
        rig.write(opened, 0)
        rig.engine.step()
    rig.assert_blended_as_ever(1)
    assert len(rig.recorder.tokens(1)[0]) == 6
    assert rig.engine.load().blocks_total - rig.engine.load().blocks_free == len(opened.blocks)
    rig.engine.handle(PagesLoaded(7, 0))
    assert_all_free(rig.engine)


def test_without_room_for_a_late_chunk_it_is_computed_beside_the_pool(model_dir: Path) -> None:
    tokens = len(blended(1).token_ids) // 4
    needed = -(-tokens // 16) + sum(-(-len(chunk) // 16) for chunk in CHUNKS) + 2
    tight = forgetful(*open_native(model_dir, {"decode_headroom": 0}, kv_bytes=needed * LAYERS * 2 * 16 * 2 * 16 * 4))
    opened = tight.load(7)
    tight.submit(1, 7)
    tight.rest()
    assert tight.engine.load().blocks_free < PAGES
    tight.engine.handle(PagesLate(7))
    for _ in range(STEPS):
        tight.write(opened, 0)
        tight.engine.step()
    tight.assert_blended_as_ever(1)
    tight.engine.handle(PagesLoaded(7, 0))
    assert_all_free(tight.engine)
    tight.engine.close()


def test_a_blend_that_waits_is_overtaken_by_one_that_need_not_and_by_decodes(rig: Rig) -> None:
    rig.engine.handle(Submit(exact_work(3, [5, 6, 7], sampling(40)), "generate"))
    rig.load(7)
    rig.submit(1, 7)
    rig.submit(2, 0)
    rig.rest()
    assert len(rig.recorder.tokens(2)[0]) == 6
    assert len(rig.recorder.tokens(3)[0]) == 40
    assert not rig.recorder.tokens(1)
    rig.engine.handle(PagesLoaded(7, 0))
    rig.rest()
    assert rig.recorder.tokens(1)[0] == rig.recorder.tokens(2)[0]
    assert_all_free(rig.engine)


def test_epic_reads_its_chunks_in_the_first_layer_and_waits_before_it(rig: Rig) -> None:
    opened = rig.load(7)
    work = msgspec.structs.replace(blended(1), blend=BlendSpec("epic", 0.0, 8))
    rig.engine.handle(Submit(work, "prefill", (0, 7, 0)))
    rig.rest()
    assert not rig.recorder.of(KvReady)
    rig.write(opened, PAGES)
    rig.engine.handle(PagesLoaded(7, PAGES))
    rig.rest()
    assert {event.layer for event in rig.recorder.of(KvReady)} == set(range(LAYERS))
    finish(rig.engine, ReleaseSource(Dispatch(1, 1)))


def test_a_wait_for_pages_is_no_hang_and_no_work(rig: Rig) -> None:
    rig.load(7)
    rig.submit(1, 7)
    rig.rest()
    before = rig.engine.load()
    assert before.running == 1
    assert not rig.engine.step()
    assert rig.engine.load().step > before.step
    finish(rig.engine, Cancel(Dispatch(1, 1)), PagesLoaded(7, 0))
    assert_all_free(rig.engine)


@pytest.mark.parametrize("late", [False, True])
def test_a_cancel_while_pages_come_leaves_their_blocks_to_the_load(rig: Rig, late: bool) -> None:
    opened = rig.load(7)
    rig.submit(1, 7)
    rig.rest()
    finish(rig.engine, Cancel(Dispatch(1, 1)))
    if late:
        rig.engine.handle(PagesLate(7))
    assert rig.engine.load().blocks_total - rig.engine.load().blocks_free == len(opened.blocks)
    rig.engine.handle(PagesLoaded(7, 0))
    rig.engine.handle(PagesLate(7))  # crosses it on the way: without effect
    assert_all_free(rig.engine)
