"""Which tokens become chunks, what is refused, and what workers are told: the same chunks at every attempt, and no exact keys."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace

import pytest

from controller.blend_request import blend_of
from controller.generate_request import GenerateLimits, check_head, generation_request
from controller.kv_blend import Chunk, KvBlend, Recipe, blend, keys_of, marked, put_blend, separated
from kv_transfer.keys import chunk_hashes, namespace_root
from pdserve.errors import InvalidRequest
from pdserve.v1 import inference_pb2, worker_pb2
from tests.controller.cluster_twin import asked, cluster

IDENTITY = b"i" * 32
PROMPT = array("i", range(100, 220)).tobytes()
LIMITS = GenerateLimits("tiny", 4096, 256, 4)


def packed(*token_ids: int) -> bytes:
    return array("i", token_ids).tobytes()


def test_separated_chunks_lie_before_each_separator_and_the_question_is_none() -> None:
    prompt = packed(5, 6, 9, 9, 7, 9, 9, 8, 1)
    assert separated(prompt, packed(9, 9)) == (Chunk(0, 2), Chunk(4, 5))


def test_a_separator_is_found_at_whole_tokens_only() -> None:
    straddling = packed(0x00000900, 0x00000000)  # holds the bytes of token 9 in the middle of a token
    assert packed(9)[:1] in straddling
    with pytest.raises(InvalidRequest, match=r"do not occur"):
        separated(straddling, packed(9))
    assert separated(straddling + packed(9, 1), packed(9)) == (Chunk(0, 2),)


def test_short_chunks_stay_fresh_and_the_last_two_tokens_belong_to_no_chunk() -> None:
    chunks = (Chunk(0, 15), Chunk(20, 36), Chunk(40, 60), Chunk(80, 100))
    kept = blend(Recipe(), chunks, 60)
    assert kept == KvBlend(Recipe(), (Chunk(20, 36), Chunk(40, 58)))
    assert blend(Recipe(), (Chunk(0, 15),), 60) is None


def test_too_many_chunks_are_refused_but_short_ones_do_not_count() -> None:
    many = [Chunk(16 * at, 16 * at + 16) for at in range(1025)]
    with pytest.raises(InvalidRequest, match="at most 1024"):
        blend(Recipe(), many, 16 * 1025 + 2)
    short = [Chunk(4 * at, 4 * at + 4) for at in range(2000)]
    assert blend(Recipe(), [*short, Chunk(8000, 8016)], 9000) == KvBlend(Recipe(), (Chunk(8000, 8016),))


@pytest.mark.parametrize(
    ("pairs", "param", "words"),
    [
        ([(5, 5)], "kv_blend.chunks[0]", "is empty"),
        ([(-1, 5)], "kv_blend.chunks[0]", "is empty"),
        ([(0, 20), (19, 30)], "kv_blend.chunks[1]", "begins before"),
        ([(0, 20), (30, 99)], "kv_blend.chunks[1]", "98 or before"),
        ([(0, 20), (30, 10**9)], "kv_blend.chunks[1]", "100 tokens"),
    ],
)
def test_offsets_that_do_not_fit_are_named(pairs: list[tuple[int, int]], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        marked(pairs, 100)
    assert caught.value.param == param
    assert marked([(0, 20), (20, 98)], 100) == (Chunk(0, 20), Chunk(20, 98))


def test_workers_are_told_chunks_by_content_under_the_tenants_root() -> None:
    work = worker_pb2.Work(token_ids=PROMPT)
    asked = KvBlend(Recipe("epic", first_tokens=8), (Chunk(3, 40), Chunk(50, 66)))
    put_blend(work, asked, keys_of(asked.chunks, PROMPT, IDENTITY, "salt"))
    root = namespace_root(IDENTITY, "salt")
    assert [(chunk.start, chunk.count) for chunk in work.chunks] == [(3, 37), (50, 16)]
    assert work.chunks[0].keys == chunk_hashes(root, PROMPT[12:160])
    assert work.chunks[1].keys != chunk_hashes(namespace_root(IDENTITY), PROMPT[200:264])
    assert (work.blend.method, work.blend.first_tokens) == (worker_pb2.Blend.METHOD_EPIC, 8)


def message() -> inference_pb2.GenerateRequest:
    made = inference_pb2.GenerateRequest(token_ids=PROMPT)
    made.sampling.max_tokens = 4
    made.kv_blend.chunks.add(start=0, end=40)
    return made


def test_defaults_of_the_proto_are_those_of_http() -> None:
    check_head(message(), LIMITS)
    request = generation_request(message(), "r", PROMPT, LIMITS, None)
    assert request.kv_blend == KvBlend(Recipe("blend", 0.15, 32), (Chunk(0, 40),))
    changed = message()
    changed.kv_blend.method, changed.kv_blend.ratio = inference_pb2.KvBlend.METHOD_EPIC, 0
    changed.kv_blend.first_tokens = 0
    assert blend_of(changed.kv_blend, PROMPT) == KvBlend(Recipe("epic", 0, 0), (Chunk(0, 40),))
    by_speeds = message()
    by_speeds.kv_blend.auto_ratio = True
    assert blend_of(by_speeds.kv_blend, PROMPT) == KvBlend(Recipe(ratio="auto"), (Chunk(0, 40),))


def _both(changed: inference_pb2.GenerateRequest) -> None:
    changed.kv_blend.separator_ids = packed(5)


def _neither(changed: inference_pb2.GenerateRequest) -> None:
    del changed.kv_blend.chunks[:]


def _two_ratios(changed: inference_pb2.GenerateRequest) -> None:
    changed.kv_blend.ratio, changed.kv_blend.auto_ratio = 0.2, True


def _torn(changed: inference_pb2.GenerateRequest) -> None:
    _neither(changed)
    changed.kv_blend.separator_ids = b"abc"


def _empty_separator(changed: inference_pb2.GenerateRequest) -> None:
    _neither(changed)
    changed.kv_blend.separator_ids = b""


def _ratio(changed: inference_pb2.GenerateRequest) -> None:
    changed.kv_blend.ratio = float("nan")


def _prompt_logprobs(changed: inference_pb2.GenerateRequest) -> None:
    changed.sampling.prompt_logprobs = 1


@pytest.mark.parametrize(
    ("change", "param"),
    [
        (_both, "kv_blend"), (_neither, "kv_blend"), (_torn, "kv_blend.separator"),
        (_empty_separator, "kv_blend.separator"), (_two_ratios, "kv_blend.ratio"),
        (_ratio, "kv_blend.ratio"), (_prompt_logprobs, "kv_blend"),
    ],
)  # fmt: skip
def test_what_cannot_be_blended_is_refused_by_name(
    change: Callable[[inference_pb2.GenerateRequest], None], param: str
) -> None:
    changed = message()
    change(changed)
    with pytest.raises(InvalidRequest) as caught:
        generation_request(changed, "r", PROMPT, LIMITS, None)
    assert caught.value.param == param


async def test_every_attempt_carries_the_same_chunks_and_no_exact_key() -> None:
    wanted = KvBlend(Recipe(), (Chunk(0, 16), Chunk(20, 40)))
    async with cluster() as twin:
        await twin.square()
        for worker in twin.workers.values():
            worker.faults.die_after_tokens = 10 if worker.worker_id.startswith("d") else None
        await twin.add(twin.twin("d2", *twin.workers["d0"].roles))
        got = await twin.collect(replace(asked(40), kv_blend=wanted, request_id="blended"))
        assert len(got.token_ids[0]) == 40
        assert got.begun is not None
        assert got.begun.blended_tokens == 36
        commands = [command for worker in twin.workers.values() for command in worker.commands]
        works = [command.prefill.work for command in commands if command.WhichOneof("command") == "prefill"]
        assert len(works) > 1
        assert {work.block_hashes for work in works} == {b""}
        assert len({tuple(chunk.SerializeToString() for chunk in work.chunks) for work in works}) == 1
        assert len({work.blend.SerializeToString() for work in works}) == 1
        timeline = twin.desk.request("blended")
        assert timeline is not None
        assert timeline.blended_tokens == timeline.attempts[-1].blended_tokens == 36
        started = sum(attempt.blended_tokens == 36 for attempt in timeline.attempts)
        assert started > 1
        counted = twin.metrics.registry.get_sample_value("pdserve_kv_blended_tokens_total")
        assert counted == 36 * started
