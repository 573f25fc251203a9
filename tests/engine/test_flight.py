"""Prompts beside the decodes: tokens, announcements and blocks are those of one batch, whenever the lane does its work and tells it.

No lane here is a device's: engine.cuda_streams has never run on a GPU.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import pytest
import torch

from engine.block_tables import BlockTables
from engine.cuda_streams import prompt_lane
from engine.flight import Flights
from engine.kv_memory import Arena, DeviceKvMemory
from engine.loaded_model import LoadedModel, load_model
from engine.native import NativeEngine
from engine.page_protocol import KvOffered, LoadPages, OfferPages, PagesLoaded, PagesOpened, PagesSaved
from engine.pool import BlockPool
from engine.protocol import (
    Activate,
    Cancel,
    ClearPrefixCache,
    Dispatch,
    Event,
    Freed,
    KvReady,
    KvStored,
    PrefillDone,
    PromptLogprobs,
    ReleaseSource,
    ReserveBlocks,
    Reserved,
    ReserveRefused,
    SetPolicy,
    Started,
    Submit,
    Work,
    WorkFailed,
    WriterDone,
)
from engine.schedule import Schedule
from engine.sequences import DispatchState
from pdserve.errors import ConfigInvalid
from service_kit.config import EngineConfig, ModelConfig
from tests.engine.lanes import PollLane, When
from tests.engine.rig import MIB, PROMPT, Recorder, assert_all_free, finish, generate, sampling, work
from tests.engine.test_kv_memory import SlowLane

CPU = torch.device("cpu")
PAGE = 16


@pytest.fixture(scope="module")
def model(model_dir: Path) -> LoadedModel:
    config = ModelConfig(path=str(model_dir), device="cpu", dtype="float32")
    loaded, memory = load_model(config, EngineConfig(kv_bytes=4 * MIB, threads=1))
    memory.close()
    return loaded


class Reader(Recorder):
    """Reads announced blocks at once, as a peer does."""

    def __init__(self, arena: torch.Tensor) -> None:
        super().__init__()
        self.read: dict[tuple[Dispatch, int], list[torch.Tensor]] = defaultdict(list)  # by dispatch and layer
        self._arena = arena

    def emit(self, event: Event) -> None:
        super().emit(event)
        if isinstance(event, KvReady):
            table = self.of(Started, event.dispatch.request_key)[0].blocks
            blocks = list(table[event.first_block : event.first_block + event.block_count])
            self.read[event.dispatch, event.layer].append(self._arena[event.layer, blocks].clone())


@dataclass(slots=True)
class Bench:
    """An engine whose pool is not its arena, as on a device."""

    engine: NativeEngine
    told: Reader
    arena: torch.Tensor
    publications: SlowLane
    lane: PollLane | None


def bench(model: LoadedModel, lane: PollLane | None, *, blocks: int = 400, **settings: int | bool) -> Bench:
    model = replace(model, layout=msgspec.structs.replace(model.layout, blocks=blocks))
    arena = Arena(model.layout)
    told = Reader(arena.tensor)
    publications = SlowLane()
    memory = DeviceKvMemory(arena, CPU, publications, SlowLane())
    config = EngineConfig.model_validate({"threads": 1, **settings})
    return Bench(NativeEngine(model, memory, config, told, lane), told, arena.tensor, publications, lane)


def poll_lane(seed: int, when: When = "end", most_polls: int = 6) -> PollLane:
    return PollLane(random.Random(seed), when, most_polls)


def audited(engine: NativeEngine) -> int:
    engine._audit_due_s = 0.0
    return engine.load().blocks_leaked


@dataclass(slots=True)
class Launched:
    """A bench with one decode under way and one prompt in the air; the flight ends when it is waited for."""

    on: Bench
    decoding: Work
    flying: Work

    @property
    def in_air(self) -> bool:
        return self.on.engine._flights.in_air


def launched(on: Bench, flying: Work, *, mode: str = "generate") -> Launched:
    decoding = work(1, PROMPT[:20], sampling(30))
    on.engine.handle(Submit(decoding, "generate"))
    on.engine.step()
    assert on.told.tokens(1)
    on.engine.handle(Submit(flying, "prefill" if mode == "prefill" else "generate"))
    on.engine.step()
    one = Launched(on, decoding, flying)
    assert one.in_air
    return one


@pytest.fixture
def held(model: LoadedModel) -> Iterator[Bench]:
    """Its flights end only where nothing else is left to do."""
    made = bench(model, poll_lane(1, most_polls=0))
    assert made.lane is not None
    made.lane.rng = _Never()
    yield made
    assert_all_free(made.engine)
    made.engine.close()


class _Never(random.Random):
    def randint(self, a: int, b: int) -> int:
        return 1 << 30


# ---- one flight


def test_decodes_go_on_while_a_prompt_is_in_the_air(held: Bench, model: LoadedModel) -> None:
    one = launched(held, work(2, PROMPT, sampling(6)))
    before = len(held.told.tokens(1)[0])
    for _ in range(5):
        held.engine.step()
    assert one.in_air
    assert len(held.told.tokens(1)[0]) == before + 5
    assert held.told.tokens(2) == {}
    finish(held.engine)
    plain = bench(model, None)
    generate(plain.engine, one.decoding, one.flying)
    assert [held.told.tokens(key) for key in (1, 2)] == [plain.told.tokens(key) for key in (1, 2)]
    plain.engine.close()


def test_its_pages_are_found_by_others_only_after_the_landing(held: Bench) -> None:
    one = launched(held, work(2, PROMPT, sampling(2)))
    page = one.flying.block_hashes[32:64]  # the first is that of the decode
    held.engine.step()
    stored = b"".join(event.block_hashes for event in held.told.of(KvStored))
    assert one.in_air
    assert page not in stored
    finish(held.engine)
    assert page in b"".join(event.block_hashes for event in held.told.of(KvStored))


def test_a_cancel_is_carried_out_at_the_landing_and_frees_then(held: Bench) -> None:
    one = launched(held, work(2, PROMPT, sampling(6)))
    held.engine.handle(Cancel(one.flying.dispatch))
    held.engine.step()
    assert one.in_air
    assert not held.told.of(Freed, 2)
    assert audited(held.engine) == 0
    finish(held.engine)
    assert held.told.of(Freed, 2)
    assert held.told.tokens(2) == {}


def test_choices_cancelled_in_the_air_are_not_drawn_and_the_others_are(held: Bench, model: LoadedModel) -> None:
    drawn = sampling(6, temperature=1.0, seed=4)
    one = launched(held, work(2, PROMPT, drawn, choices=(0, 1, 2)))
    held.engine.handle(Cancel(one.flying.dispatch, (1,)))
    finish(held.engine)
    plain = bench(model, None)
    generate(plain.engine, one.flying)
    expected = plain.told.tokens(2)
    assert held.told.tokens(2) == {choice: expected[choice] for choice in (0, 2)}
    plain.engine.close()


def test_a_cancelled_prefill_keeps_its_announced_blocks_until_its_reader_is_done(held: Bench) -> None:
    one = launched(held, work(2, PROMPT), mode="prefill")
    held.engine.handle(Cancel(one.flying.dispatch))
    finish(held.engine)
    assert held.told.of(KvReady, 2)
    assert not held.told.of(PrefillDone, 2)
    assert not held.told.of(Freed, 2)
    held.engine.handle(ReleaseSource(one.flying.dispatch))
    assert held.told.of(Freed, 2)


def test_what_was_announced_is_in_the_arena_before_a_cancelled_prefill_without_a_reader_is_freed(held: Bench) -> None:
    one = launched(held, work(2, PROMPT), mode="prefill")
    held.engine.handle(Cancel(one.flying.dispatch))
    held.engine.handle(ReleaseSource(one.flying.dispatch))
    finish(held.engine)
    ends = [type(event) for event in (*held.told.of(KvReady, 2), *held.told.of(Freed, 2))]
    told = [
        event for event in held.told.events if isinstance(event, KvReady | Freed) and event.dispatch.request_key == 2
    ]
    assert [type(event) for event in told] == ends
    assert ends[-1] is Freed
    assert KvReady in ends


def test_layers_are_announced_in_the_air_once_they_are_in_the_arena(model: LoadedModel) -> None:
    on = bench(model, PollLane(_Never(), "launch", 0), prefix_reuse=False)
    one = launched(on, work(2, PROMPT), mode="prefill")
    assert len(on.publications.waiting) == 3
    on.publications.end_next()
    on.engine.step()
    assert one.in_air
    assert [event.layer for event in on.told.of(KvReady, 2)] == [0]
    finish(on.engine)
    assert [event.layer for event in on.told.of(KvReady, 2)] == [0, 1, 2]
    on.engine.handle(ReleaseSource(one.flying.dispatch))
    assert_all_free(on.engine)
    on.engine.close()


def test_cached_pages_are_announced_before_the_prompt_takes_off(held: Bench) -> None:
    launched(held, work(2, PROMPT), mode="prefill")
    assert [(event.layer, event.block_count) for event in held.told.of(KvReady, 2)] == [(0, 1), (1, 1), (2, 1)]
    finish(held.engine)
    held.engine.handle(ReleaseSource(Dispatch(2, 1)))


def test_pages_are_lent_after_the_landing_and_a_lender_who_gives_up_before_is_heard(held: Bench) -> None:
    one = launched(held, work(2, PROMPT, sampling(2)))
    begun = held.publications.begun
    for load_id in (1, 2):
        held.engine.handle(LoadPages(load_id, one.decoding.token_ids, one.decoding.block_hashes, mode="lend"))
    held.engine.handle(PagesLoaded(2, 0))
    assert one.in_air
    assert (held.publications.begun, held.told.of(PagesOpened)) == (begun, [])
    finish(held.engine)
    assert {event.load_id: len(event.held) for event in held.told.of(PagesOpened)}[1] == 1
    held.engine.handle(PagesLoaded(1, 0))


def test_an_engine_that_closes_waits_for_what_is_in_the_air(model: LoadedModel) -> None:
    on = bench(model, PollLane(_Never(), "end", 0))
    launched(on, work(2, PROMPT))
    assert on.lane is not None
    assert (on.lane.waits, on.lane.landed) == (1, 1)  # the first prompt had no decodes beside it
    on.engine.close()
    assert (on.lane.waits, on.lane.landed, on.lane.log) == (2, 1, ["closed"])


def test_nothing_flies_without_a_lane_and_only_prompts_board() -> None:
    tables = BlockTables(BlockPool(8), PAGE)
    schedule = Schedule(tables, SetPolicy(64, 8, 32, 0), prefix_reuse=False)
    assert Flights(None, schedule).boarding([]) == []
    flights = Flights(poll_lane(1), schedule)
    assert not flights.in_air
    assert not flights.ended()
    assert not flights.postpones(Cancel(Dispatch(1, 1)))


def test_an_own_stream_is_refused_where_there_are_none(model: LoadedModel) -> None:
    assert prompt_lane(model, EngineConfig()) is None
    with pytest.raises(ConfigInvalid, match=r"engine\.prefill_stream is own"):
        prompt_lane(model, EngineConfig(prefill_stream="own"))


# ---- many flights


def test_a_decode_that_needs_room_waits_for_the_youngest_in_the_air_and_no_older_one_goes(model: LoadedModel) -> None:
    on = bench(model, PollLane(_Never(), "end", 0), blocks=10, prefix_reuse=False)
    older = [work(key, PROMPT[: 31 + key], sampling(40)) for key in (1, 2)]
    finish_of = [len(one.token_ids) // 4 + 40 for one in older]
    assert sum(-(-tokens // PAGE) for tokens in finish_of) <= 10
    for one in older:
        on.engine.handle(Submit(one, "generate"))
    on.engine.step()
    on.engine.handle(Submit(work(3, PROMPT[:60], sampling(2)), "generate"))
    on.engine.step()
    while on.engine._flights.in_air:
        assert on.engine.load().preemptions == 0
        on.engine.step()
    finish(on.engine)
    assert on.engine.load().preemptions >= 1
    assert [len(on.told.tokens(key)[0]) for key in (1, 2, 3)] == [40, 40, 2]
    assert_all_free(on.engine)
    on.engine.close()


@dataclass(slots=True)
class Storm:
    """Random arrivals, cancels, hand-offs in both directions, offers and loans, over a pool that is too small."""

    on: Bench
    source: Bench  # computes what is handed over to `on`
    rng: random.Random
    works: list[Work]
    modes: dict[int, str]
    disturbed: set[int] = field(default_factory=set)  # cancelled, or failed
    loans: int = 0
    seen: int = 0  # events
    flown_steps: int = 0
    postponed: int = 0

    def run(self) -> None:
        engine = self.on.engine
        engine.handle(OfferPages(4))
        for one in self.works:
            self._arrive(one)
            for _ in range(self.rng.randrange(4)):
                self._step()
                self._disturb()
        for _ in range(5000):
            if not self._step() and not engine._desk.states and not engine._tables.offers.blocks():
                return
        raise AssertionError("it never ends")

    def _arrive(self, one: Work) -> None:
        match self.modes[one.dispatch.request_key]:
            case "reserve":
                self.on.engine.handle(ReserveBlocks(one, 10_000))
            case "prefill":
                self.on.engine.handle(Submit(one, "prefill"))
            case _:
                self.on.engine.handle(Submit(one, "generate"))

    def _step(self) -> bool:
        flies = self.on.engine._flights.in_air
        busy = self.on.engine.step()
        self.flown_steps += flies and self.on.engine._flights.in_air
        assert audited(self.on.engine) == 0
        self._answer()
        return busy

    def _disturb(self) -> None:
        engine, chance = self.on.engine, self.rng.random()
        if chance < 0.15 and engine._desk.states:
            state = self.rng.choice([*engine._desk.states.values(), *self._flying()])
            self.disturbed.add(state.dispatch.request_key)
            some = tuple(choice for choice in state.choices if self.rng.random() < 0.5)
            engine.handle(Cancel(state.dispatch, some))
            self.postponed += bool(engine._flights._flight and engine._flights._flight.postponed)
            if state.mode == "reserve":
                engine.handle(WriterDone(state.dispatch))
            if state.mode == "prefill" and self.rng.random() < 0.5:
                engine.handle(ReleaseSource(state.dispatch))
        elif chance < 0.2:
            engine.handle(ClearPrefixCache())
        elif chance < 0.3:
            self.loans += 1
            one = self.rng.choice(self.works)
            engine.handle(LoadPages(self.loans, one.token_ids, one.block_hashes, mode="lend"))
            if self.rng.random() < 0.3:
                engine.handle(PagesLoaded(self.loans, 0))

    def _flying(self) -> list[DispatchState]:
        return [sequence.state for sequence in self.on.engine._schedule.flying]

    def _answer(self) -> None:
        """What the io process does with the events since the last step."""
        engine, events = self.on.engine, self.on.told.events
        fresh, self.seen = events[self.seen :], len(events)
        for event in fresh:
            match event:
                case KvOffered():
                    engine.handle(PagesSaved(tuple(page.block for page in event.pages)))
                case PagesOpened():
                    engine.handle(PagesLoaded(event.load_id, 0))
                case Reserved():
                    self._hand_over(event)
                case ReserveRefused() | WorkFailed():
                    self.disturbed.add(event.dispatch.request_key)
                case PrefillDone():
                    self._check_announced(event.dispatch)
                    engine.handle(ReleaseSource(event.dispatch))
        # Prefills that were cancelled have no reader either.
        for state in list(engine._desk.states.values()):
            if state.phase == "source" and not state.peer_done:
                engine.handle(ReleaseSource(state.dispatch))

    def _hand_over(self, event: Reserved) -> None:
        key, cached = event.dispatch.request_key, event.cached_tokens // PAGE
        one = next(one for one in self.works if one.dispatch.request_key == key)
        finish(self.source.engine, Submit(one, "prefill"))
        (done,) = self.source.told.of(PrefillDone, key)
        blocks = self.source.told.of(Started, key)[0].blocks
        for here, there in list(zip(event.blocks, blocks, strict=True))[cached:]:
            self.on.arena[:, here] = self.source.arena[:, there]
        self.on.engine.handle(Activate(event.dispatch, done.going_on))
        self.source.engine.handle(ReleaseSource(event.dispatch))

    def _check_announced(self, dispatch: Dispatch) -> None:
        """Every block of every layer was announced once and held then what it holds now."""
        if dispatch.request_key in self.disturbed:
            return  # its reader may have gone before
        blocks = list(self.on.told.of(Started, dispatch.request_key)[0].blocks)
        for layer in range(3):
            whole = torch.cat(self.on.told.read[dispatch, layer])
            assert torch.equal(whole, self.on.engine._memory.pool[layer, blocks])


def storm_works(rng: random.Random, count: int) -> tuple[list[Work], dict[int, str]]:
    prefixes = [[rng.randrange(5, 500) for _ in range(80)] for _ in range(2)]
    works, modes = list[Work](), dict[int, str]()
    for key in range(1, count + 1):
        own = [rng.randrange(5, 500) for _ in range(rng.choice([1, 2, 15, 16, 17, 60, 120]))]
        prompt = rng.choice([[], *prefixes])[: rng.choice([16, 33, 80])] + own
        modes[key] = rng.choice(["generate", "generate", "generate", "prefill", "reserve"])
        drawn = sampling(
            rng.choice([1, 3, 20, 40]), temperature=rng.choice([0.0, 1.0]), seed=key, logprobs=rng.choice([None, 2]),
            prompt_logprobs=rng.choice([None, None, 1]) if modes[key] == "generate" else None,
        )  # fmt: skip
        choices = tuple(range(rng.choice([1, 1, 1, 3])))
        works.append(work(key, prompt, drawn, choices=choices, priority=rng.choice([0, 0, 1])))
    return works, modes


@pytest.fixture(scope="module")
def totals() -> Iterator[list[tuple[int, int, int]]]:
    """Of each storm: steps in which decodes were computed beside a flight, commands that waited for a landing, preemptions."""
    found: list[tuple[int, int, int]] = []
    yield found

    assert all(sum(column) > 5 for column in zip(*found, strict=True)), "these storms show nothing"


@pytest.mark.parametrize("when", ["launch", "end"])
@pytest.mark.parametrize("seed", range(8))
def test_in_a_storm_tokens_are_those_of_one_batch_and_no_block_leaks(
    model: LoadedModel, totals: list[tuple[int, int, int]], seed: int, when: When
) -> None:
    rng = random.Random(seed)
    works, modes = storm_works(rng, 24)
    settings = {"prefill_chunk": rng.choice([0, 40, 64]), "token_budget": rng.choice([48, 256])}
    source = bench(model, None)
    on = bench(model, poll_lane(seed, when), blocks=rng.choice([20, 26, 60]), prefix_reuse=seed % 4 != 3, **settings)
    storm = Storm(on, source, rng, works, modes)
    storm.run()
    assert_all_free(on.engine)
    plain = bench(model, None)
    generate(plain.engine, *works)
    for one in works:
        _compare(storm, plain, one)
    totals.append((storm.flown_steps, storm.postponed, on.engine.load().preemptions))
    for each in (on, source, plain):
        each.engine.close()


def _compare(storm: Storm, plain: Bench, one: Work) -> None:
    key, mode = one.dispatch.request_key, storm.modes[one.dispatch.request_key]
    got, wanted = storm.on.told.tokens(key), plain.told.tokens(key)
    if mode == "reserve":  # the source drew the first
        wanted = {choice: tokens[1:] for choice, tokens in wanted.items() if tokens[1:]}
    if mode == "prefill":
        wanted = {choice: tokens[:1] for choice, tokens in wanted.items()}
    if key in storm.disturbed:
        assert all(tokens == wanted[choice][: len(tokens)] for choice, tokens in got.items())
        return
    assert got == wanted
    mine, others = (
        [row.logprobs for told in each.told.of(PromptLogprobs, key) for row in told.rows] for each in (storm.on, plain)
    )
    assert len(mine) == len(others)
    assert all(torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-4) for a, b in zip(mine, others, strict=True))
