"""Storms over an engine with a lane for prompts: tokens, announcements and blocks are those of one batch."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from engine.loaded_model import LoadedModel
from engine.page_protocol import KvOffered, LoadPages, OfferPages, PagesLoaded, PagesOpened, PagesSaved
from engine.protocol import (
    Activate,
    Cancel,
    ClearPrefixCache,
    Dispatch,
    PrefillDone,
    PromptLogprobs,
    ReleaseSource,
    ReserveBlocks,
    Reserved,
    ReserveRefused,
    Started,
    Submit,
    Work,
    WorkFailed,
    WriterDone,
)
from engine.sequences import DispatchState
from tests.engine.flight_rig import Bench, audited, bench, poll_lane, small_model
from tests.engine.lanes import When
from tests.engine.rig import assert_all_free, finish, generate, sampling, work

PAGE = 16


@pytest.fixture(scope="module")
def model(model_dir: Path) -> LoadedModel:
    return small_model(model_dir)


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


@pytest.mark.parametrize("when", ["launch", "end"])
@pytest.mark.parametrize("seed", range(8))
def test_in_a_storm_tokens_are_those_of_one_batch_and_no_block_leaks(model: LoadedModel, seed: int, when: When) -> None:
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
    assert storm.flown_steps > 10, "hardly a decode was computed beside a flight"
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
