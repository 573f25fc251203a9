"""What every Engine promises, run over the native and the modelled one."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.protocol import (
    Activate,
    Cancel,
    ClearPrefixCache,
    Dispatch,
    Engine,
    EngineReady,
    Event,
    Freed,
    KvReady,
    PrefillDone,
    ReleaseSource,
    ReserveBlocks,
    Reserved,
    ReserveRefused,
    Started,
    StepTokens,
    Submit,
    WorkFailed,
    WriterDone,
)
from simulator.modelled_engine import LAYOUT, ModelledConfig, ModelledEngine
from tests.engine.rig import (
    PROMPT,
    Recorder,
    assert_all_free,
    families,
    finish,
    open_native,
    sampling,
    save_random,
    work,
)

BLOCKS = 85


@dataclass(frozen=True, slots=True)
class Subject:
    engine: Engine
    recorder: Recorder
    ready: EngineReady


Opener = Callable[[], Subject]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    save_random(families()["llama"], directory)
    return directory


@pytest.fixture(params=["native", "modelled"])
def opener(request: pytest.FixtureRequest, model_dir: Path) -> Opener:
    def native() -> Subject:
        engine, recorder = open_native(model_dir, kv_bytes=1 << 20)
        return Subject(engine, recorder, engine.ready())

    def modelled() -> Subject:
        recorder = Recorder()
        layout = LAYOUT.__class__(2, BLOCKS, 16, 1, 4, "float32", LAYOUT.block_bytes)
        engine = ModelledEngine(ModelledConfig(layout=layout, kv_bytes=False, max_context_tokens=4096), recorder)
        return Subject(engine, recorder, engine.ready())

    return {"native": native, "modelled": modelled}[request.param]


@pytest.fixture
def subject(opener: Opener) -> Iterator[Subject]:
    one = opener()
    yield one
    assert_all_free(one.engine)


def kinds(recorder: Recorder, *wanted: type[Event]) -> list[type[Event]]:
    """Types of the events of the wanted types, each run of equal ones once."""
    found: list[type[Event]] = []
    for event in recorder.events:
        if isinstance(event, wanted) and (not found or found[-1] is not type(event)):
            found.append(type(event))
    return found


def test_ready_describes_the_arena(subject: Subject) -> None:
    layout = subject.ready.layout
    assert subject.engine.load().blocks_total == layout.blocks
    assert layout.block_bytes == 2 * layout.page_tokens * layout.kv_heads * layout.head_dim * 4
    assert len(subject.ready.identity) == 32


def test_that_a_prompt_was_begun_is_told_before_anything_of_it_is_computed(subject: Subject) -> None:
    """Should the step end the process, it is known who was at work."""
    finish(subject.engine, Submit(work(1, PROMPT), "generate"))
    types = [type(event) for event in subject.recorder.events]
    assert any(types.index(Started) < count <= types.index(StepTokens) for count in subject.recorder.flushed)


def test_the_events_of_a_prefill_come_in_order_and_announce_every_block_of_every_layer_once(subject: Subject) -> None:
    finish(subject.engine, Submit(work(1, PROMPT, choices=(0, 1)), "prefill"))
    recorder, layout = subject.recorder, subject.ready.layout
    assert kinds(recorder, Started, KvReady, StepTokens, PrefillDone) == [Started, KvReady, StepTokens, PrefillDone]
    announced = [
        (event.layer, event.first_block + offset)
        for event in recorder.of(KvReady, 1)
        for offset in range(event.block_count)
    ]
    assert sorted(announced) == [(layer, block) for layer in range(layout.layers) for block in range(5)]
    assert len(recorder.of(Started, 1)[0].blocks) == 5
    (done,) = recorder.of(PrefillDone, 1)
    assert {choice: tokens[0] for choice, tokens in recorder.tokens(1).items()} == dict(done.going_on)
    assert not recorder.of(Freed, 1)
    subject.engine.handle(ReleaseSource(Dispatch(1, 1)))
    assert len(recorder.of(Freed, 1)) == 1


def test_generated_tokens_are_numbered_from_0_and_end_with_a_reason(subject: Subject) -> None:
    finish(subject.engine, Submit(work(1, PROMPT, sampling(6), choices=(0, 1)), "generate"))
    assert {choice: len(tokens) for choice, tokens in subject.recorder.tokens(1).items()} == {0: 6, 1: 6}
    assert subject.recorder.finishes(1) == {0: 2, 1: 2}
    assert len(subject.recorder.of(Freed, 1)) == 1


def test_output_of_earlier_attempts_is_neither_told_nor_counted_again(subject: Subject) -> None:
    finish(subject.engine, Submit(work(1, PROMPT, sampling(6), output=[9, 8], attempt=2), "generate"))
    (first, *_) = [step for step in subject.recorder.of(StepTokens) if step.request_keys]
    assert first.indices[0] == 2
    assert len(subject.recorder.tokens(1, attempt=2)[0]) == 4


def test_an_activated_reservation_goes_on_from_the_first_tokens(opener: Opener) -> None:
    source, target = opener(), opener()
    one = work(1, PROMPT, sampling(6), choices=(0, 1, 2))
    finish(source.engine, Submit(one, "prefill"))
    (done,) = source.recorder.of(PrefillDone, 1)
    target.engine.handle(ReserveBlocks(one, 10_000))
    (grant,) = target.recorder.of(Reserved, 1)
    assert (len(grant.blocks), len(grant.generations), grant.cached_tokens) == (5, 5, 0)
    assert target.engine.load().reserved_blocks == 5
    finish(target.engine, Activate(one.dispatch, done.going_on[:2]))
    tokens = target.recorder.tokens(1)
    assert {choice: len(ids) for choice, ids in tokens.items()} == {0: 5, 1: 5}
    assert len(target.recorder.of(Freed, 1)) == 1
    source.engine.handle(ReleaseSource(one.dispatch))
    for subject in (source, target):
        assert_all_free(subject.engine)


def test_a_known_prefix_is_shared_with_reservations_until_it_is_forgotten(subject: Subject) -> None:
    engine, recorder = subject.engine, subject.recorder
    finish(engine, Submit(work(1, PROMPT), "generate"))
    for key in (2, 3):
        engine.handle(ReserveBlocks(work(key, PROMPT), 10_000))
        engine.handle(Cancel(Dispatch(key, 1)))
        engine.handle(WriterDone(Dispatch(key, 1)))
        engine.handle(ClearPrefixCache())
    assert [event.cached_tokens for event in recorder.of(Reserved)] == [64, 0]


def test_a_reservation_is_all_or_nothing(subject: Subject) -> None:
    engine, recorder = subject.engine, subject.recorder
    blocks = subject.ready.layout.blocks
    engine.handle(ReserveBlocks(work(1, [20] * 16 * (blocks - 4)), 10_000))
    engine.handle(ReserveBlocks(work(2, [21] * 16 * 5), 10_000))
    assert recorder.of(ReserveRefused, 2)[0].reason == "no_capacity"
    assert engine.load().blocks_free == 4
    for command in (Cancel(Dispatch(1, 1)), WriterDone(Dispatch(1, 1))):
        engine.handle(command)


@pytest.mark.parametrize("order", [(Cancel, WriterDone), (WriterDone, Cancel)])
def test_reserved_blocks_are_freed_once_when_request_and_writer_are_done(
    subject: Subject, order: tuple[type[Cancel] | type[WriterDone], type[Cancel] | type[WriterDone]]
) -> None:
    subject.engine.handle(ReserveBlocks(work(1, PROMPT), 10_000))
    subject.engine.handle(order[0](Dispatch(1, 1)))
    assert not subject.recorder.of(Freed, 1)
    for kind in (*order[1:], *order):
        subject.engine.handle(kind(Dispatch(1, 1)))
    assert len(subject.recorder.of(Freed, 1)) == 1


def test_generations_rise_with_each_reuse(subject: Subject) -> None:
    seen: dict[int, int] = {}
    for key in range(1, 5):
        subject.engine.handle(ReserveBlocks(work(key, [key + 20] * 16 * 60), 10_000))
        (grant,) = subject.recorder.of(Reserved, key)
        for block, generation in zip(grant.blocks, grant.generations, strict=True):
            assert generation > seen.get(block, 0)
            seen[block] = generation
        subject.engine.handle(Cancel(Dispatch(key, 1)))
        subject.engine.handle(WriterDone(Dispatch(key, 1)))


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([20] * 4096, "context_length_exceeded"),
        ([20] * 16 * BLOCKS, "no_capacity"),
        ([-1], "invalid_request_error"),
        ([2**30], "invalid_request_error"),
    ],
)
def test_what_can_never_run_is_refused_at_once(subject: Subject, prompt: list[int], reason: str) -> None:
    subject.engine.handle(Submit(work(1, prompt), "generate"))
    subject.engine.handle(ReserveBlocks(work(2, prompt), 10_000))
    assert subject.recorder.of(WorkFailed, 1)[0].reason == reason
    assert subject.recorder.of(ReserveRefused, 2)[0].reason == reason
    assert not subject.engine.step()


def test_a_cancel_that_overtook_its_work_holds(subject: Subject) -> None:
    finish(subject.engine, Cancel(Dispatch(1, 1)), Submit(work(1, PROMPT), "generate"))
    assert subject.recorder.of(WorkFailed, 1)[0].reason == "cancelled"
    finish(subject.engine, Submit(work(1, PROMPT, attempt=2), "generate"))
    assert len(subject.recorder.tokens(1, attempt=2)[0]) == 8


def test_load_counts_what_runs_and_what_waits(subject: Subject) -> None:
    for key in (1, 2):
        subject.engine.handle(Submit(work(key, PROMPT, sampling(10)), "generate"))
    assert subject.engine.load().waiting == 2
    assert subject.engine.load().waiting_tokens == 2 * len(array("i", PROMPT))
    for _ in range(3):
        subject.engine.step()
    busy = subject.engine.load()
    assert (busy.running, busy.waiting) == (2, 0)
    assert busy.blocks_free < busy.blocks_total
    finish(subject.engine)
