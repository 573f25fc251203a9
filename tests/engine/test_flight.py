"""Prompts beside the decodes: tokens, announcements and blocks are those of one batch, whenever the lane does its work and tells it.

No lane here is a device's: engine.cuda_streams has never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.block_tables import BlockTables
from engine.cuda_streams import prompt_lane
from engine.flight import Flights
from engine.loaded_model import LoadedModel
from engine.page_protocol import LoadPages, PagesLoaded, PagesOpened
from engine.pool import BlockPool
from engine.protocol import (
    Cancel,
    Dispatch,
    Freed,
    KvReady,
    KvStored,
    PrefillDone,
    ReleaseSource,
    SetPolicy,
    Submit,
    Work,
)
from engine.schedule import Schedule
from pdserve.errors import ConfigInvalid
from service_kit.config import EngineConfig
from tests.engine.flight_rig import Bench, audited, bench, poll_lane, small_model
from tests.engine.lanes import Never, PollLane
from tests.engine.rig import PROMPT, assert_all_free, finish, generate, sampling, work

PAGE = 16


@pytest.fixture(scope="module")
def model(model_dir: Path) -> LoadedModel:
    return small_model(model_dir)


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
    made.lane.rng = Never()
    yield made
    assert_all_free(made.engine)
    made.engine.close()


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
    on = bench(model, PollLane(Never(), "launch", 0), prefix_reuse=False)
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
    on = bench(model, PollLane(Never(), "end", 0))
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
    on = bench(model, PollLane(Never(), "end", 0), blocks=10, prefix_reuse=False)
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
