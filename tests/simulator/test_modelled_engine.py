"""What a modelled engine promises besides the engine contract: tokens that survive re-dispatch, modelled time, checked KV."""

from __future__ import annotations

import mmap
from dataclasses import replace

import msgspec
import pytest

from engine.protocol import (
    Activate,
    Cancel,
    ClearPrefixCache,
    Command,
    Dispatch,
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
    StepTokens,
    Submit,
    Work,
    WorkFailed,
    WriterDone,
)
from simulator.cost_model import CostModel
from simulator.modelled_engine import POLICY, ModelledConfig
from simulator.token_draw import Vocabulary
from tests.simulator.works import SAMPLING, Bench, layout, with_max_tokens, work

PROMPT = list(range(100, 150))  # 50 tokens: 3 full blocks and a tail


def generate(bench: Bench, **changes: object) -> list[int]:
    bench.engine.handle(Submit(work(PROMPT, **changes), "generate"))  # type: ignore[arg-type]
    bench.run()
    return bench.sink.tokens()


def test_equal_work_gives_equal_tokens_in_any_engine() -> None:
    assert generate(Bench()) == generate(Bench())


def test_another_seed_gives_other_tokens() -> None:
    other = msgspec.structs.replace(SAMPLING, seed=8)
    assert generate(Bench()) != generate(Bench(), sampling=other)


def test_greedy_work_depends_on_neither_seed_nor_choice() -> None:
    greedy = msgspec.structs.replace(SAMPLING, temperature=0.0)
    bench = Bench()
    first = generate(bench, sampling=greedy, choices=(0, 1))
    assert first == bench.sink.tokens(choice=1)
    assert first == generate(Bench(), sampling=msgspec.structs.replace(greedy, seed=99))


@pytest.mark.parametrize("accepted", [1, 7, 19])
def test_a_redispatch_goes_on_with_the_same_tokens(accepted: int) -> None:
    whole = generate(Bench())
    bench = Bench()
    assert generate(bench, accepted=whole[:accepted], attempt=2) == whole[accepted:]
    assert bench.sink.rows()[0][3] == accepted


def test_a_handed_over_request_gives_the_tokens_of_an_undisaggregated_one() -> None:
    source, destination = Bench(), Bench()
    job = work(PROMPT, choices=(0, 1))
    hand_over(source, destination, job)
    destination.run()
    alone = Bench()
    alone.engine.handle(Submit(job, "generate"))
    alone.run()
    for choice in (0, 1):
        assert source.sink.tokens(choice=choice) + destination.sink.tokens(choice=choice) == alone.sink.tokens(
            choice=choice
        )


def hand_over(source: Bench, destination: Bench, job: Work, *, corrupt: bool = False) -> None:
    """Prefill at `source`, KV bytes copied block by block, Activate at `destination`."""
    destination.engine.handle(ReserveBlocks(job, 10_000))
    source.engine.handle(Submit(job, "prefill"))
    source.run()
    (reserved,), (started,) = destination.sink.of(Reserved)[-1:], source.sink.of(Started)[-1:]
    shape = source.engine.config.layout
    with (
        mmap.mmap(source.engine.arena_fd, 0) as from_map,
        mmap.mmap(destination.engine.arena_fd, 0) as to_map,
    ):
        for ready in source.sink.of(KvReady):
            for ordinal in range(ready.first_block, ready.first_block + ready.block_count):
                if ordinal * shape.page_tokens < reserved.cached_tokens:
                    continue
                start = (ready.layer * shape.blocks + started.blocks[ordinal]) * shape.block_bytes
                goal = (ready.layer * shape.blocks + reserved.blocks[ordinal]) * shape.block_bytes
                to_map[goal : goal + shape.block_bytes] = from_map[start : start + shape.block_bytes]
        if corrupt:
            goal = (shape.blocks + reserved.blocks[1]) * shape.block_bytes
            to_map[goal] ^= 1
    (done,) = source.sink.of(PrefillDone)[-1:]
    source.engine.handle(ReleaseSource(job.dispatch))
    destination.engine.handle(Activate(job.dispatch, done.going_on))


def test_a_hand_over_with_one_wrong_byte_fails_typed_and_frees_its_blocks() -> None:
    source, destination = Bench(), Bench()
    hand_over(source, destination, work(PROMPT), corrupt=True)
    destination.run()
    assert [failure.reason for failure in destination.sink.of(WorkFailed)] == ["kv_corrupt"]
    assert destination.sink.tokens() == []
    assert destination.engine.load().blocks_free == destination.engine.config.layout.blocks


def test_every_layer_of_every_block_is_announced_once_and_in_order() -> None:
    bench = Bench(replace(ModelledConfig(), policy=msgspec.structs.replace(POLICY, prefill_chunk=20)))
    bench.engine.handle(Submit(work(PROMPT), "prefill"))
    bench.run()
    for layer in (0, 1):
        ready = [(event.first_block, event.block_count) for event in bench.sink.of(KvReady) if event.layer == layer]
        assert ready == [(0, 1), (1, 1), (2, 2)]
    kinds = [type(event) for event in bench.sink.events]
    assert kinds.index(PrefillDone) > kinds.index(StepTokens) > max(i for i, k in enumerate(kinds) if k is KvReady)


def test_layers_become_ready_one_after_the_other_while_the_step_lasts() -> None:
    bench = Bench(replace(ModelledConfig(), cost=CostModel(1.0, 0.0, 0.0, 0.0, 0.0), layout=layout(64, layers=4)))
    bench.engine.handle(Submit(work(PROMPT), "prefill"))
    plan = bench.engine.begin_step()
    assert plan is not None
    seen = [len(bench.sink.of(KvReady)) for _ in bench.engine.phases(plan)]
    assert seen == [0, 1, 2, 3]


def test_a_step_lasts_as_long_as_the_cost_model_says() -> None:
    cost = CostModel(0.5, 0.01, 0.1, 0.02, 0.001, speed=2.0)
    bench = Bench(replace(ModelledConfig(), cost=cost))
    bench.engine.handle(Submit(work(PROMPT, sampling=with_max_tokens(2)), "generate"))
    bench.engine.step()
    assert bench.now_s == pytest.approx(100 + (0.5 + 0.01 * 50) / 2)
    bench.engine.step()
    assert bench.now_s == pytest.approx(100 + (0.5 + 0.01 * 50) / 2 + (0.1 + 0.02 + 0.001 * 51) / 2)


def test_source_blocks_stay_until_the_source_is_released() -> None:
    bench = Bench(replace(ModelledConfig(), prefix_reuse=False))
    total = bench.engine.load().blocks_total
    job = work(PROMPT)
    bench.engine.handle(Submit(job, "prefill"))
    bench.run()
    assert bench.engine.load().blocks_free == total - 4
    bench.engine.handle(ReleaseSource(job.dispatch))
    assert bench.engine.load().blocks_free == total
    assert bench.sink.of(Freed) == [Freed(job.dispatch)]


@pytest.mark.parametrize("writer_first", [True, False])
def test_reserved_blocks_return_when_request_and_writer_are_done(writer_first: bool) -> None:
    bench = Bench()
    job = work(PROMPT)
    bench.engine.handle(ReserveBlocks(job, 10_000))
    ends: list[Command] = [WriterDone(job.dispatch), Cancel(job.dispatch)]
    first, second = ends if writer_first else reversed(ends)
    bench.engine.handle(first)
    assert bench.sink.of(Freed) == []
    bench.engine.handle(second)
    assert bench.sink.of(Freed) == [Freed(job.dispatch)]
    assert bench.engine.load().blocks_free == bench.engine.load().blocks_total


def test_work_that_comes_after_its_cancel_is_refused_until_the_tombstone_is_gone() -> None:
    bench = Bench()
    job = work(PROMPT)
    bench.engine.handle(Cancel(job.dispatch))
    bench.engine.handle(ReserveBlocks(job, 10_000))
    bench.engine.handle(Submit(job, "generate"))
    assert [refused.reason for refused in bench.sink.of(ReserveRefused)] == ["cancelled"]
    assert [failed.reason for failed in bench.sink.of(WorkFailed)] == ["cancelled"]
    bench.now_s += 20.1
    assert len(generate(bench)) == SAMPLING.max_tokens


def test_a_reservation_leaves_the_head_room_of_running_sequences() -> None:
    policy = SetPolicy(2048, 256, 512, decode_headroom_blocks=5)
    bench = Bench(replace(ModelledConfig(), layout=layout(8), policy=policy))
    bench.engine.handle(ReserveBlocks(work(PROMPT), 10_000))
    assert [refused.reason for refused in bench.sink.of(ReserveRefused)] == ["no_capacity"]
    assert bench.engine.load().blocks_free == 8


def test_a_prompt_beyond_the_context_is_refused_by_name() -> None:
    bench = Bench(replace(ModelledConfig(), max_context_tokens=50))
    bench.engine.handle(Submit(work(PROMPT), "generate"))
    assert [failed.reason for failed in bench.sink.of(WorkFailed)] == ["context_length_exceeded"]


def test_a_prompt_beyond_the_pool_is_refused_by_name() -> None:
    bench = Bench(replace(ModelledConfig(), layout=layout(3)))
    bench.engine.handle(Submit(work(PROMPT), "generate"))
    assert [failed.reason for failed in bench.sink.of(WorkFailed)] == ["no_capacity"]


def test_a_sequence_that_outgrows_the_pool_fails_typed_and_the_others_go_on() -> None:
    bench = Bench(replace(ModelledConfig(), layout=layout(8)))
    for key in (1, 2):
        bench.engine.handle(Submit(work([key, *PROMPT], key=key, sampling=with_max_tokens(64)), "generate"))
    bench.run()
    assert [failed.reason for failed in bench.sink.of(WorkFailed)] == ["no_capacity"]
    assert max(len(bench.sink.tokens(1)), len(bench.sink.tokens(2))) == 64
    assert bench.engine.load().blocks_free == 8


def test_output_ends_at_max_tokens_with_finish_length() -> None:
    bench = Bench()
    assert len(generate(bench)) == 20
    assert [row[5] for row in bench.sink.rows()] == [0] * 19 + [2]


def test_output_ends_at_a_stop_id_but_not_before_min_tokens() -> None:
    free = generate(Bench())
    stop = msgspec.structs.replace(SAMPLING, stop_token_ids=(free[5],))
    bench = Bench()
    assert generate(bench, sampling=stop) == free[:6]
    assert bench.sink.rows()[-1][5] == 1
    later = generate(Bench(), sampling=msgspec.structs.replace(stop, min_tokens=10))
    assert free[5] not in later[:10]


def test_eos_ends_the_output_unless_it_is_ignored() -> None:
    config = replace(ModelledConfig(), vocabulary=Vocabulary(eos_rate=0.5))
    bench = Bench(config)
    tokens = generate(bench)
    assert tokens[-1] == 2
    assert len(tokens) < 20
    ignoring = generate(Bench(config), sampling=msgspec.structs.replace(SAMPLING, ignore_eos=True))
    assert len(ignoring) == 20


def test_the_context_limit_ends_the_output_with_finish_length() -> None:
    bench = Bench(replace(ModelledConfig(), max_context_tokens=55))
    assert len(generate(bench)) == 5
    assert bench.sink.rows()[-1][5] == 2


def test_logprobs_have_the_drawn_token_first_and_as_many_alternatives_as_asked() -> None:
    bench = Bench()
    tokens = generate(bench, sampling=msgspec.structs.replace(SAMPLING, logprobs=3))
    rows = [row for step in bench.sink.of(StepTokens) for row in step.logprobs]
    assert [row.token_ids[0] for row in rows if row] == tokens
    assert all(row and len(row.token_ids) == len(row.logprobs) == 4 for row in rows)
    assert all(row and list(row.logprobs[1:]) == sorted(row.logprobs[1:], reverse=True) for row in rows)


def test_prompt_logprobs_come_before_the_first_token_and_turn_reuse_off() -> None:
    bench = Bench()
    generate(bench)
    asking = msgspec.structs.replace(SAMPLING, prompt_logprobs=1)
    generate(bench, key=2, sampling=asking)
    (rows,) = bench.sink.of(PromptLogprobs)
    assert [row.token_ids[0] for row in rows.rows] == PROMPT[1:]
    assert bench.sink.of(Started)[1].cached_tokens == 0


def test_a_second_prompt_reuses_the_blocks_of_the_first() -> None:
    bench = Bench()
    generate(bench)
    generate(bench, key=2)
    assert bench.sink.of(Started)[1].cached_tokens == 48
    assert bench.engine.load().prefix_hits == 48
    bench.engine.handle(ClearPrefixCache())
    generate(bench, key=3)
    assert bench.sink.of(Started)[2].cached_tokens == 0


def test_output_blocks_enter_the_prefix_index_under_the_keys_of_the_whole_sequence() -> None:
    bench = Bench()
    tokens = generate(bench)
    stored = b"".join(event.block_hashes for event in bench.sink.of(KvStored))
    assert stored == work([*PROMPT, *tokens[:-1]]).block_hashes


def test_one_choice_can_be_cancelled_while_the_others_go_on() -> None:
    bench = Bench()
    bench.engine.handle(Submit(work(PROMPT, choices=(0, 1)), "generate"))
    bench.engine.step()
    bench.engine.step()
    bench.engine.handle(Cancel(Dispatch(1, 1), (0,)))
    bench.run()
    assert (len(bench.sink.tokens(choice=0)), len(bench.sink.tokens(choice=1))) == (2, 20)
    assert len(bench.sink.of(Freed)) == 1
