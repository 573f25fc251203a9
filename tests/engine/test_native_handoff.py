"""Two native engines as source and destination of a hand-off, over copied blocks: announcements, equality, releases."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.native import NativeEngine
from engine.page_protocol import KvOffered, OfferPages
from engine.protocol import (
    Activate,
    Dispatch,
    Freed,
    KvReady,
    KvStored,
    PrefillDone,
    ReleaseSource,
    ReserveBlocks,
    Reserved,
    Started,
    StepTokens,
    Submit,
)
from kv_transfer.keys import HASH_BYTES
from tests.engine.rig import (
    PROMPT,
    Recorder,
    assert_all_free,
    finish,
    generate,
    open_native,
    sampling,
    work,
)


def hand_off(source: NativeEngine, recorder: Recorder, target: NativeEngine, received: Recorder, key: int) -> None:
    """What two io processes do: reserve, prefill, copy each announced block of the arena, activate, release."""
    (table,) = recorder.of(Started, key)
    (grant,) = received.of(Reserved, key)
    first = grant.cached_tokens // 16
    seen: list[tuple[int, int]] = []
    for ready in recorder.of(KvReady, key):
        for ordinal in range(ready.first_block, ready.first_block + ready.block_count):
            seen.append((ready.layer, ordinal))
    blocks = table.blocks
    assert sorted(seen) == [(layer, ordinal) for layer in range(3) for ordinal in range(len(blocks))]
    for layer, ordinal in seen:
        if ordinal >= first:
            target._memory.pool[layer, grant.blocks[ordinal]] = source._memory.pool[layer, blocks[ordinal]]
    (done,) = recorder.of(PrefillDone, key)
    target.handle(Activate(done.dispatch, done.going_on))
    source.handle(ReleaseSource(done.dispatch))


@pytest.mark.parametrize(
    ("length", "kv_dtype"), [*((length, "float32") for length in (1, 16, 75, 600)), (600, "float8_e4m3")]
)
def test_prefill_here_and_decode_there_equal_one_engine(model_dir: Path, length: int, kv_dtype: str) -> None:
    prompt = [(11 * position) % 500 + 5 for position in range(length)]
    drawn = sampling(20, temperature=0.7, seed=6)
    source, announced = open_native(model_dir, {"prefill_chunk": 128, "kv_dtype": kv_dtype})
    target, received = open_native(model_dir, {"kv_dtype": kv_dtype})
    for key in (1, 2):  # the second time both sides hold the prefix
        one = work(key, prompt, drawn, choices=(0, 1, 2))
        target.handle(ReserveBlocks(one, 10_000))
        finish(source, Submit(one, "prefill"))
        hand_off(source, announced, target, received, key)
        finish(target)
        alone, told = open_native(model_dir, {"kv_dtype": kv_dtype})
        generate(alone, one)
        for choice, tokens in told.tokens(key).items():
            assert announced.tokens(key)[choice] == tokens[:1]
            assert received.tokens(key)[choice] == tokens[1:]
        alone.close()
    for engine in (source, target):
        assert_all_free(engine)
        engine.close()


@pytest.mark.parametrize(("prefix_reuse", "keyed"), [(True, 1), (False, 0)])
def test_a_grant_waits_for_no_keys_but_those_that_are_looked_up(
    model_dir: Path, prefix_reuse: bool, keyed: int
) -> None:
    engine, recorder = open_native(model_dir, {"prefix_reuse": prefix_reuse})
    one = work(1, [(11 * position) % 500 + 5 for position in range(600)], sampling(20))
    engine.handle(ReserveBlocks(one, 10_000))
    assert recorder.of(Reserved, 1)
    table = engine._desk.states[one.dispatch].table
    assert table is not None
    assert len(table.chain._pages) == keyed
    engine.close()


def test_the_pages_of_what_was_handed_over_enter_the_index_after_the_second_token(model_dir: Path) -> None:
    source, announced = open_native(model_dir, {})
    target, received = open_native(model_dir, {})
    one = work(1, PROMPT, sampling(20))
    target.handle(ReserveBlocks(one, 10_000))
    finish(source, Submit(one, "prefill"))
    hand_off(source, announced, target, received, 1)
    finish(target)
    kinds = [type(event) for event in received.events if isinstance(event, StepTokens | KvStored)]
    assert kinds[:2] == [StepTokens, KvStored]
    (first, *_) = received.of(KvStored)
    assert len(first.block_hashes) == len(PROMPT) // 16 * HASH_BYTES
    for engine in (source, target):
        engine.close()


@pytest.mark.parametrize(("answer", "offered_there"), [(2, 0), (20, (len(PROMPT) + 19) // 16)])
def test_what_was_handed_over_is_saved_by_whoever_computed_it_and_there_once_the_answer_fills_a_page(
    model_dir: Path, answer: int, offered_there: int
) -> None:
    source, announced = open_native(model_dir, {})
    target, received = open_native(model_dir, {})
    one = work(1, PROMPT, sampling(answer))
    for engine in (source, target):
        engine.handle(OfferPages(64))
    target.handle(ReserveBlocks(one, 10_000))
    finish(source, Submit(one, "prefill"))
    hand_off(source, announced, target, received, 1)
    finish(target)
    pages = {
        at: [page.ordinal for event in each.of(KvOffered) for page in event.pages]
        for at, each in (("source", announced), ("target", received))
    }
    assert pages == {"source": list(range(len(PROMPT) // 16)), "target": list(range(offered_there))}
    for engine in (source, target):
        engine.close()


def test_kv_is_announced_layer_by_layer_with_each_chunk_and_the_tail_with_the_last(model_dir: Path) -> None:
    engine, recorder = open_native(model_dir, {"prefill_chunk": 40})
    finish(engine, Submit(work(1, PROMPT), "prefill"))
    ready = [(event.layer, event.first_block, event.block_count) for event in recorder.of(KvReady, 1)]
    assert ready == [(layer, 0, 2) for layer in range(3)] + [(layer, 2, 3) for layer in range(3)]
    kinds = [
        type(event) for event in recorder.events if isinstance(event, Started | KvReady | StepTokens | PrefillDone)
    ]
    assert kinds == [Started, *[KvReady] * 6, StepTokens, PrefillDone]
    engine.handle(ReleaseSource(Dispatch(1, 1)))
    assert_all_free(engine)
    engine.close()


def test_a_prefill_that_ends_with_its_first_token_has_nothing_to_hand_off(
    native: tuple[NativeEngine, Recorder],
) -> None:
    engine, recorder = native
    finish(engine, Submit(work(1, PROMPT, sampling(1)), "prefill"))
    assert recorder.of(PrefillDone, 1)[0].going_on == ()
    assert not recorder.of(Freed, 1)
    engine.handle(ReleaseSource(Dispatch(1, 1)))
    assert len(recorder.of(Freed, 1)) == 1
