"""KV memory of both devices behind one contract, and what is announced when while copies are on their way.

The device's memory runs here over host tensors and a lane of copies that end when the test says so; never on a GPU so far.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.block_tables import BlockCopy
from engine.cuda_export import Copy, Event, runs
from engine.kv_memory import Arena, DeviceKvMemory, HostKvMemory, KvMemory, copy_blocks
from engine.native import NativeEngine
from engine.page_protocol import KvOffered, OfferPages
from engine.protocol import Event as EngineEvent
from engine.protocol import KvReady, Layout, PrefillDone, ReleaseSource, Started, Submit
from service_kit.config import EngineConfig, ModelConfig
from tests.engine.rig import MIB, PROMPT, Recorder, assert_all_free, finish, open_native, sampling, work

LAYOUT = Layout(
    layers=3, blocks=12, page_tokens=16, kv_heads=2, head_dim=8, dtype="float32", block_bytes=2 * 16 * 2 * 8 * 4
)
CPU = torch.device("cpu")


@dataclass(slots=True)
class LaneEvent:
    lane: SlowLane
    passed: bool = False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        while not self.passed:
            self.lane.end_next()


@dataclass(slots=True)
class SlowLane:
    """A CopyLane whose copies take place, in order, when one of them is waited for or the test ends it."""

    waiting: deque[tuple[Sequence[Copy], LaneEvent]] = field(default_factory=deque)
    begun: int = 0

    def copy(self, copies: Sequence[Copy]) -> Event:
        event = LaneEvent(self)
        self.waiting.append((copies, event))
        self.begun += 1
        return event

    def end_next(self) -> None:
        copies, event = self.waiting.popleft()
        for each in copies:
            each.target.copy_(each.source)
        event.passed = True


@dataclass(frozen=True, slots=True)
class Held:
    """A memory, its arena as the io process sees it, and the lane of its copies where it has one."""

    memory: KvMemory
    arena: torch.Tensor
    lane: SlowLane | None


def host() -> Held:
    arena = Arena(LAYOUT)
    return Held(HostKvMemory(arena), arena.tensor, None)


def device() -> Held:
    arena, lane = Arena(LAYOUT), SlowLane()
    return Held(DeviceKvMemory(arena, CPU, lane, SlowLane()), arena.tensor, lane)


@pytest.fixture(params=[host, device])
def held(request: pytest.FixtureRequest) -> Iterator[Held]:
    made: Held = request.param()
    yield made
    made.memory.close()


# ---- both devices


def test_after_settle_the_arena_holds_what_was_published_and_all_of_it_is_announced_in_order(held: Held) -> None:
    told: list[int] = []
    content = torch.randn(held.memory.pool.shape, generator=torch.Generator().manual_seed(1))
    held.memory.pool.copy_(content)
    for layer in range(3):
        held.memory.publish(layer, [2, 3, 7, 5], partial(told.append, layer))
    held.memory.settle()
    assert told == [0, 1, 2]
    assert torch.equal(held.arena[:, [2, 3, 5, 7]], content[:, [2, 3, 5, 7]])


def test_what_was_received_is_in_the_pool_when_absorb_returns(held: Held) -> None:
    content = torch.randn(held.arena.shape, generator=torch.Generator().manual_seed(2))
    held.arena.copy_(content)
    held.memory.absorb([8, 1, 2])
    assert torch.equal(held.memory.pool[:, [1, 2, 8]], content[:, [1, 2, 8]])


def test_blocks_that_were_not_published_stay_out_of_the_devices_arena() -> None:
    held = device()
    held.memory.pool.fill_(3.0)
    held.memory.publish(1, [4], lambda: None)
    held.memory.settle()
    assert held.arena.count_nonzero() == held.arena[1, 4].numel()
    held.memory.close()


def test_a_copied_block_is_that_of_its_source_in_every_layer(held: Held) -> None:
    held.memory.pool.copy_(torch.randn(held.memory.pool.shape))
    copy_blocks(held.memory.pool, [BlockCopy(3, 9)])
    assert torch.equal(held.memory.pool[:, 9], held.memory.pool[:, 3])


# ---- the device's order of events


def announcing(told: list[tuple[int, bool]], held: Held, layer: int, wanted: torch.Tensor) -> Callable[[], None]:
    return lambda: told.append((layer, torch.equal(held.arena[layer, 4:6], wanted[layer, 4:6])))


def test_nothing_is_announced_before_its_copy_has_ended_nor_out_of_order() -> None:
    held = device()
    assert held.lane is not None
    content = torch.randn(held.memory.pool.shape)
    held.memory.pool.copy_(content)
    told: list[tuple[int, bool]] = []
    held.memory.publish(0, [4, 5], announcing(told, held, 0, content))
    held.memory.publish(1, [4, 5], announcing(told, held, 1, content))
    assert (told, held.lane.begun) == ([], 2)  # begun, and nobody waited
    held.lane.end_next()
    held.memory.publish(2, [4, 5], announcing(told, held, 2, content))
    assert told == [(0, True)]
    held.memory.settle()
    assert told == [(0, True), (1, True), (2, True)]
    held.memory.settle()
    assert len(told) == 3
    held.memory.close()


def test_published_neighbours_travel_in_one_copy() -> None:
    held = device()
    assert held.lane is not None
    held.memory.publish(0, [3, 4, 5, 9, 10, 1], lambda: None)
    ((copies, _),) = held.lane.waiting
    assert [len(each.target) for each in copies] == [3, 2, 1]
    assert all(each.target.is_contiguous() and each.source.is_contiguous() for each in copies)
    held.memory.close()


@given(st.lists(st.integers(0, 30), unique=True))
def test_runs_are_the_blocks_in_their_order(blocks: list[int]) -> None:
    found = list(runs(blocks))
    assert [block for run in found for block in range(run.start, run.stop)] == blocks
    assert all(one.stop != other.start for one, other in pairwise(found))


# ---- an engine over it


class ArenaReader:
    """An EventSink that reads announced blocks from the arena at once, as a peer does."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.arena = torch.zeros(0)
        self.seen: list[tuple[int, torch.Tensor]] = []

    def emit(self, event: EngineEvent) -> None:
        self.recorder.emit(event)
        if isinstance(event, KvReady):
            part = slice(event.first_block, event.first_block + event.block_count)
            self.seen.append((event.layer, self.arena[event.layer, list(self.table()[part])].clone()))

    def flush(self) -> None:
        pass

    def table(self) -> tuple[int, ...]:
        return tuple(self.recorder.of(Started, 1)[0].blocks)


@pytest.mark.parametrize("chunk", [0, 40])
def test_a_prefill_announces_finished_blocks_only_and_all_of_them_before_it_is_done(
    model_dir: Path, chunk: int
) -> None:
    sink = ArenaReader()
    settings = EngineConfig(kv_bytes=4 * MIB, threads=1, prefill_chunk=chunk)
    plain = NativeEngine.open(ModelConfig(path=str(model_dir), device="cpu", dtype="float32"), settings, sink)
    arena, lane = Arena(plain._model.layout), SlowLane()
    engine = NativeEngine(plain._model, DeviceKvMemory(arena, CPU, lane, SlowLane()), settings, sink)
    sink.arena = arena.tensor
    finish(engine, Submit(work(1, PROMPT, sampling(4)), "prefill"))
    assert not lane.waiting
    kinds = [type(event) for event in sink.recorder.events]
    assert kinds.index(PrefillDone) > max(at for at, kind in enumerate(kinds) if kind is KvReady)
    alone, told = open_native(model_dir, {"prefill_chunk": chunk})
    finish(alone, Submit(work(1, PROMPT, sampling(4)), "prefill"))
    ready = [(event.layer, event.first_block, event.block_count) for event in sink.recorder.of(KvReady, 1)]
    assert ready == [(event.layer, event.first_block, event.block_count) for event in told.of(KvReady, 1)]
    for layer in range(3):
        whole = torch.cat([part for at, part in sink.seen if at == layer])
        assert torch.equal(whole, engine._memory.pool[layer, list(sink.table())])
    for each in (engine, alone):
        each.handle(ReleaseSource(work(1, PROMPT).dispatch))
        assert_all_free(each)
        each.close()
    plain.close()


def test_pages_offered_with_the_last_step_are_told_when_nothing_is_left_to_compute(model_dir: Path) -> None:
    recorder, settings = Recorder(), EngineConfig(kv_bytes=4 * MIB, threads=1)
    plain = NativeEngine.open(ModelConfig(path=str(model_dir), device="cpu", dtype="float32"), settings, recorder)
    lane = SlowLane()
    engine = NativeEngine(
        plain._model, DeviceKvMemory(Arena(plain._model.layout), CPU, lane, SlowLane()), settings, recorder
    )
    finish(engine, OfferPages(16), Submit(work(1, PROMPT, sampling(1)), "generate"))
    assert not lane.waiting
    assert [len(event.pages) for event in recorder.of(KvOffered)] == [len(PROMPT) // 16]
    engine.close()
    plain.close()
