"""Blends inside the engine: the KV is that of the pass alone, chunks are kept by content, and nothing approximate is ever shared."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from engine.blend import BlendPass, BlendPrompt
from engine.blend_selection import Blend
from engine.chunk_kv import ChunkIsolation, PlacedChunk
from engine.native import NativeEngine
from engine.protocol import (
    BlendSpec,
    Cancel,
    ChunkSpan,
    Dispatch,
    KvReady,
    KvStored,
    PrefillDone,
    ReleaseSource,
    Started,
    StepTokens,
    Submit,
    Work,
    WorkFailed,
)
from engine.scattered_attention import open_scattered
from kv_transfer.keys import chunk_hashes
from tests.engine.rig import Recorder, assert_all_free, finish, open_native, sampling
from tests.engine.rig import work as exact_work
from tests.kv_transfer.short_keys import WHOLE_FINGERPRINT, shortened_keys

LAYERS = 3
RATIO = 0.2
CHUNKS = [[(17 * at + 5 * number) % 480 + 10 for at in range(40 + 7 * number)] for number in range(3)]
QUESTION = [9, 8, 7, 6, 5, 21, 22]


def prompt_of(order: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Token ids, and where the chunks start: a token before each."""
    tokens: list[int] = []
    starts: list[int] = []
    for number in order:
        tokens.append(30 + number)
        starts.append(len(tokens))
        tokens += CHUNKS[number]
    return tokens + QUESTION, starts


def blended(
    key: int, order: tuple[int, ...] = (0, 1, 2), ratio: float = RATIO, max_tokens: int = 6, temperature: float = 0.0
) -> Work:
    tokens, starts = prompt_of(order)
    exact = exact_work(key, tokens, sampling(max_tokens, temperature=temperature))
    spans = []
    for start, number in zip(starts, order, strict=True):
        content = np.array(CHUNKS[number], dtype=np.int32).tobytes()
        spans.append(ChunkSpan(start, len(CHUNKS[number]), chunk_hashes(bytes(32), content)))
    return Work(
        exact.dispatch, exact.request_id, exact.choices, exact.token_ids, exact.prompt_tokens, exact.sampling, b"",
        0, tuple(spans), BlendSpec("blend", ratio, 0),
    )  # fmt: skip


def of_one_chunk(key: int, chunk: list[int]) -> Work:
    exact = exact_work(key, [30, *chunk, *QUESTION], sampling(6))
    span = ChunkSpan(1, len(chunk), keys_of(chunk))
    return msgspec.structs.replace(exact, block_hashes=b"", chunks=(span,), blend=BlendSpec("blend", RATIO, 0))


def keys_of(chunk: list[int]) -> bytes:
    return chunk_hashes(bytes(32), np.array(chunk, dtype=np.int32).tobytes())


def pass_alone(engine: NativeEngine, order: tuple[int, ...]) -> tuple[torch.Tensor, int]:
    """Pool of the same shape with the blend of all tokens but the last in blocks 0, 1, ...; and their number."""
    model, tokens_starts = engine._model, prompt_of(order)
    pool = torch.zeros_like(engine._memory.pool)
    isolation = ChunkIsolation(model.decoder, model.kernels, pool.dtype)
    placed = [
        PlacedChunk(start, isolation.isolate(CHUNKS[number]))
        for start, number in zip(tokens_starts[1], order, strict=True)
    ]
    tokens = tokens_starts[0][:-1]
    blocks = np.arange(-(-len(tokens) // 16) + 1, dtype=np.int32)
    attention = open_scattered(pool, model.kernels, model.spec.windows)
    BlendPass(model.decoder, attention).run(BlendPrompt(tokens, blocks, placed), Blend(RATIO))
    return pool, len(tokens)


def rows(pool: torch.Tensor, blocks: list[int], count: int) -> torch.Tensor:
    """[layers, 2, count, heads, dim] of the first tokens of a table."""
    taken = pool[:, blocks].transpose(1, 2)
    return taken.reshape(LAYERS, 2, -1, *taken.shape[-2:])[:, :, :count]


def test_the_blended_kv_is_that_of_the_pass_alone(native: tuple[NativeEngine, Recorder]) -> None:
    engine, recorder = native
    finish(engine, Submit(blended(1), "generate"))
    (started,) = recorder.of(Started)
    assert started.blended_tokens == sum(map(len, CHUNKS))
    assert len(recorder.tokens(1)[0]) == 6
    expected, count = pass_alone(engine, (0, 1, 2))
    seen = rows(engine._memory.pool, list(started.blocks), count)
    assert torch.equal(seen, rows(expected, list(range(len(started.blocks))), count))


def test_chunks_are_computed_once_and_found_in_any_order(native: tuple[NativeEngine, Recorder]) -> None:
    engine, recorder = native
    finish(engine, Submit(blended(1), "generate"))
    known = sum(len(event.block_hashes) for event in recorder.of(KvStored))
    assert known == 32 * sum(-(-len(chunk) // 16) for chunk in CHUNKS)
    finish(engine, Submit(blended(2, (2, 0, 1)), "generate"))
    assert sum(len(event.block_hashes) for event in recorder.of(KvStored)) == known
    started = recorder.of(Started)[1]
    expected, count = pass_alone(engine, (2, 0, 1))
    seen = rows(engine._memory.pool, list(started.blocks), count)
    assert torch.equal(seen, rows(expected, list(range(len(started.blocks))), count))


@pytest.mark.parametrize("fingerprint_bits", [WHOLE_FINGERPRINT, 0])
def test_a_chunk_under_the_keys_of_another_one_is_computed_itself_and_changes_nothing(
    native: tuple[NativeEngine, Recorder], model_dir: Path, fingerprint_bits: int
) -> None:
    """Of each key four bits are left: the two chunks, of equal length, have the same one for each of their pages, and where nothing
    is left of the fingerprints, those too: their tokens tell them apart."""
    engine, recorder = native
    first = CHUNKS[0]
    with shortened_keys(4, fingerprint_bits):
        draw = random.Random(3)
        drawn = ([draw.randrange(10, 490) for _ in first] for _ in range(100_000))
        second = next(other for other in drawn if keys_of(other) == keys_of(first))
        finish(engine, Submit(of_one_chunk(1, first), "generate"))
        finish(engine, Submit(of_one_chunk(2, second), "generate"))
        assert engine.load().key_collisions == 1
        fresh, clean = open_native(model_dir)
        finish(fresh, Submit(of_one_chunk(2, second), "generate"))
        count = len(first) + len(QUESTION)
        here, there = (
            rows(each._memory.pool, list(heard.of(Started)[-1].blocks), count)
            for each, heard in ((engine, recorder), (fresh, clean))
        )
        assert torch.equal(here, there)
        assert recorder.tokens(2) == clean.tokens(2)
        fresh.close()
        finish(engine, Submit(of_one_chunk(3, first), "generate"))
    assert [started.blended_tokens for started in recorder.of(Started)] == [len(first)] * 3
    assert recorder.tokens(3) == recorder.tokens(1)


def test_nothing_blended_is_found_by_an_exact_request(native: tuple[NativeEngine, Recorder], model_dir: Path) -> None:
    engine, recorder = native
    exact = exact_work(2, prompt_of((0, 1, 2))[0], sampling(6))
    finish(engine, Submit(blended(1), "generate"))
    finish(engine, Submit(exact, "generate"))
    assert recorder.of(Started)[1].cached_tokens == 0
    fresh, clean = open_native(model_dir)
    finish(fresh, Submit(exact, "generate"))
    assert recorder.tokens(2) == clean.tokens(2)
    fresh.close()


def test_what_would_be_computed_almost_whole_is_computed_whole(native: tuple[NativeEngine, Recorder]) -> None:
    engine, recorder = native
    finish(engine, Submit(blended(1, ratio=0.9), "generate"))
    finish(engine, Submit(exact_work(2, prompt_of((0, 1, 2))[0], sampling(6)), "generate"))
    assert recorder.of(Started)[0].blended_tokens == 0
    assert recorder.tokens(1) == recorder.tokens(2)


@pytest.mark.parametrize("drawn", [1, 2, 60])
def test_a_request_taken_up_again_goes_on_with_the_same_tokens(
    native: tuple[NativeEngine, Recorder], drawn: int
) -> None:
    engine, recorder = native
    whole = blended(1, max_tokens=90)
    finish(engine, Submit(whole, "generate"))
    outputs = recorder.tokens(1)[0]
    behind = whole.token_ids + np.array(outputs[:drawn], dtype=np.int32).tobytes()
    again = msgspec.structs.replace(whole, dispatch=Dispatch(2, 1), token_ids=behind)
    finish(engine, Submit(again, "generate"))
    assert recorder.of(Started)[1].blended_tokens == sum(map(len, CHUNKS))
    assert recorder.tokens(2)[0] == outputs[drawn:]


def test_a_preempted_request_goes_on_with_the_same_tokens(model_dir: Path) -> None:
    quiet, alone = open_native(model_dir)
    for key in (1, 2):
        finish(quiet, Submit(blended(key, max_tokens=220, temperature=1.0), "generate"))
    quiet.close()
    busy, recorder = open_native(model_dir, kv_bytes=400_000)
    busy.handle(Submit(blended(1, max_tokens=220, temperature=1.0), "generate"))
    while not recorder.tokens(1):
        busy.step()
    finish(busy, Submit(blended(2, max_tokens=220, temperature=1.0), "generate"))
    assert busy.load().preemptions > 0
    assert [started.blended_tokens for started in recorder.of(Started)] == [sum(map(len, CHUNKS))] * 2
    assert [recorder.tokens(key) for key in (1, 2)] == [alone.tokens(key) for key in (1, 2)]
    assert_all_free(busy)
    busy.close()


def test_without_room_for_the_chunks_the_prompt_is_computed_whole(model_dir: Path) -> None:
    needed = -(-len(prompt_of((0, 1, 2))[0]) // 16) + 3
    engine, recorder = open_native(model_dir, kv_bytes=needed * LAYERS * 2 * 16 * 2 * 16 * 4)
    finish(engine, Submit(blended(1), "generate"))
    assert recorder.of(Started)[0].blended_tokens == 0
    assert len(recorder.tokens(1)[0]) == 6
    assert_all_free(engine)
    engine.close()


def test_a_prefill_announces_every_block_of_every_layer_once(native: tuple[NativeEngine, Recorder]) -> None:
    engine, recorder = native
    finish(engine, Submit(blended(1), "prefill"))
    (started,) = recorder.of(Started)
    for layer in range(LAYERS):
        ready = [event for event in recorder.of(KvReady) if event.layer == layer]
        told = [event.first_block + at for event in ready for at in range(event.block_count)]
        assert sorted(told) == list(range(len(started.blocks)))
    assert len(recorder.of(PrefillDone)) == 1
    engine.handle(ReleaseSource(Dispatch(1, 1)))


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("mode", ["prefill", "generate"])
def test_a_cancel_at_any_point_frees_every_block(native: tuple[NativeEngine, Recorder], steps: int, mode: str) -> None:
    engine, recorder = native
    engine.handle(Submit(blended(1), "prefill" if mode == "prefill" else "generate"))
    for _ in range(steps):
        engine.step()
    finish(engine, Cancel(Dispatch(1, 1)), ReleaseSource(Dispatch(1, 1)))
    finish(engine, Submit(blended(2), "generate"))
    assert len(recorder.tokens(2)[0]) == 6


def test_decodes_go_on_while_a_prompt_is_blended(native: tuple[NativeEngine, Recorder]) -> None:
    engine, recorder = native
    engine.handle(Submit(exact_work(1, [5, 6, 7], sampling(40)), "generate"))
    for _ in range(3):
        engine.step()
    before = len(recorder.tokens(1)[0])
    engine.handle(Submit(blended(2), "generate"))
    while not recorder.tokens(2):
        engine.step()
    assert len(recorder.tokens(1)[0]) >= before + len(CHUNKS) + LAYERS
    finish(engine)


def test_chunks_that_do_not_fit_are_refused_by_name(native: tuple[NativeEngine, Recorder]) -> None:
    engine, recorder = native
    good = blended(1)
    overlapping = (good.chunks[0], ChunkSpan(good.chunks[0].start + 3, 5, b""))
    beyond = (ChunkSpan(0, len(good.token_ids) // 4, b""),)
    for key, chunks in enumerate((overlapping, beyond, ()), start=1):
        dispatch = Dispatch(key, 1)
        engine.handle(
            Submit(
                Work(
                    dispatch, "r", (0,), good.token_ids, good.prompt_tokens, good.sampling, b"", 0, chunks, good.blend
                ),
                "generate",
            )
        )
    assert [failed.reason for failed in recorder.of(WorkFailed)] == ["invalid_request_error"] * 3
    assert not recorder.of(StepTokens)
