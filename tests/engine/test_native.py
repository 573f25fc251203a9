"""The native engine through its protocol: choices, seeds, stops, reuse, resumption, preemption, cancels, leaks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from engine.kernels import build
from engine.kernels.library import load_kernels
from engine.native import NativeEngine
from engine.protocol import (
    Activate,
    Cancel,
    ClearPrefixCache,
    Command,
    Dispatch,
    Freed,
    KvEvicted,
    KvStored,
    PromptLogprobs,
    ReleaseSource,
    ReserveBlocks,
    Reserved,
    ReserveRefused,
    Started,
    Submit,
    WorkFailed,
    WriterDone,
)
from pdserve.errors import ConfigInvalid
from tests.engine.rig import (
    PROMPT,
    Recorder,
    assert_all_free,
    families,
    finish,
    generate,
    open_native,
    sampling,
    save_random,
    work,
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return save_random(families()["llama"], tmp_path_factory.mktemp("reference"))


def single(model_dir: Path, prompt: list[int], **drawn: int | float) -> list[int]:
    """Tokens of one request alone in a fresh engine."""
    engine, recorder = open_native(model_dir)
    generate(engine, work(1, prompt, sampling(**drawn)))  # type: ignore[arg-type]
    engine.close()
    return recorder.tokens(1)[0]


def keys_of(hashes: bytes) -> set[bytes]:
    return {hashes[start : start + 32] for start in range(0, len(hashes), 32)}


# ---- tokens


def test_choices_share_one_prefill_and_each_equals_itself_drawn_alone(native: tuple[NativeEngine, Recorder]) -> None:
    engine, recorder = native
    drawn = sampling(20, temperature=0.9, seed=5)
    generate(engine, work(1, PROMPT, drawn, choices=(0, 1, 2)))
    together = recorder.tokens(1)
    assert len({tuple(tokens) for tokens in together.values()}) == 3
    assert len(recorder.of(Started, 1)) == 1
    for choice in (0, 1, 2):
        generate(engine, work(10 + choice, PROMPT, drawn, choices=(choice,)))
        assert recorder.tokens(10 + choice)[choice] == together[choice]


def test_a_seed_repeats_its_tokens_in_any_company_and_another_seed_draws_others(
    native: tuple[NativeEngine, Recorder],
) -> None:
    engine, recorder = native
    drawn = sampling(24, temperature=1.0, seed=3)
    generate(engine, work(1, PROMPT, drawn))
    others = [work(10 + key, PROMPT[key:], sampling(24, temperature=1.0, seed=key)) for key in range(4, 9)]
    generate(engine, *others, work(2, PROMPT, drawn), work(3, PROMPT, sampling(24, temperature=1.0, seed=4)))
    assert recorder.tokens(1) == recorder.tokens(2)
    assert recorder.tokens(1) != recorder.tokens(3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("accepted", [1, 7, 16])
def test_a_resumed_request_draws_what_it_would_have_drawn(
    native: tuple[NativeEngine, Recorder], temperature: float, accepted: int
) -> None:
    engine, recorder = native
    drawn = sampling(24, temperature=temperature, seed=9)
    generate(engine, work(1, PROMPT, drawn))
    whole = recorder.tokens(1)[0]
    engine.handle(ClearPrefixCache())
    generate(engine, work(1, PROMPT, drawn, output=whole[:accepted], attempt=2))
    assert recorder.tokens(1, attempt=2)[0] == whole[accepted:]


def test_log_probabilities_of_the_prompt_equal_those_of_transformers(
    native: tuple[NativeEngine, Recorder], reference: PreTrainedModel
) -> None:
    engine, recorder = native
    prompt = PROMPT * 9  # more than one chunk
    generate(engine, work(1, prompt), work(2, prompt, sampling(2, prompt_logprobs=3)))
    (told,) = recorder.of(PromptLogprobs, 2)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert [row.token_ids[0] for row in told.rows] == prompt[1:]
    given = torch.tensor([row.logprobs[0] for row in told.rows])
    wanted = expected[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(given, wanted, atol=1e-4, rtol=0)
    assert recorder.tokens(2)[0] == recorder.tokens(1)[0][:2]


def test_stop_ids_end_a_choice_and_min_tokens_holds_them_back(native: tuple[NativeEngine, Recorder]) -> None:
    engine, recorder = native
    generate(engine, work(1, PROMPT, sampling(12)))
    greedy = recorder.tokens(1)[0]
    stop = greedy[4]
    first = greedy.index(stop)
    generate(engine, work(2, PROMPT, sampling(12, stop_token_ids=(stop,))))
    assert recorder.tokens(2)[0] == greedy[: first + 1]
    assert (recorder.finishes(1), recorder.finishes(2)) == ({0: 2}, {0: 1})
    generate(engine, work(3, PROMPT, sampling(12, stop_token_ids=(stop,), min_tokens=9)))
    assert stop not in recorder.tokens(3)[0][:9]


def test_max_tokens_counts_from_the_prompt_and_the_context_ends_a_choice(native: tuple[NativeEngine, Recorder]) -> None:
    engine, recorder = native
    generate(engine, work(1, PROMPT, sampling(5)), work(2, PROMPT, sampling(5), output=[9, 8], attempt=2))
    assert len(recorder.tokens(1)[0]) == 5
    assert len(recorder.tokens(2, attempt=2)[0]) == 3
    long = [5 + position % 400 for position in range(4090)]
    generate(engine, work(3, long, sampling(100)))
    assert len(recorder.tokens(3)[0]) == 6
    assert recorder.finishes(3) == {0: 2}


# ---- reuse


def test_a_prefix_is_reused_with_equal_tokens_until_the_cache_is_cleared(
    native: tuple[NativeEngine, Recorder],
) -> None:
    engine, recorder = native
    generate(engine, work(1, PROMPT))
    generate(engine, work(2, PROMPT))
    assert [event.cached_tokens for event in recorder.of(Started)] == [0, 64]
    engine.handle(ClearPrefixCache())
    generate(engine, work(3, PROMPT))
    assert recorder.of(Started)[-1].cached_tokens == 0
    assert recorder.tokens(1) == recorder.tokens(2) == recorder.tokens(3)
    stored = b"".join(event.block_hashes for event in recorder.of(KvStored))
    evicted = b"".join(event.block_hashes for event in recorder.of(KvEvicted))
    assert len(evicted) == 5 * 32  # prompt and output filled five pages
    assert keys_of(evicted) <= keys_of(stored)


def test_output_is_reused_as_the_prompt_of_the_next_turn(native: tuple[NativeEngine, Recorder]) -> None:
    engine, recorder = native
    generate(engine, work(1, PROMPT, sampling(40)))
    turn = [*PROMPT, *recorder.tokens(1)[0]]
    generate(engine, work(2, turn))
    assert recorder.of(Started)[-1].cached_tokens == 112


# ---- preemption


def test_preempted_requests_end_with_the_tokens_of_an_undisturbed_run(model_dir: Path) -> None:
    prompts = [PROMPT[start:] + PROMPT[:start] for start in range(14)]
    drawn = sampling(60, temperature=0.8, seed=2)
    expected = [single(model_dir, prompt, max_tokens=60, temperature=0.8, seed=2) for prompt in prompts]
    engine, recorder = open_native(model_dir, kv_bytes=1 << 20)
    assert engine.load().blocks_total < 14 * 9  # they cannot all be held at once
    generate(engine, *(work(key, prompt, drawn) for key, prompt in enumerate(prompts)))
    assert engine.load().preemptions > 0
    assert [recorder.tokens(key)[0] for key in range(14)] == expected
    assert_all_free(engine)
    engine.close()


# ---- refusals


def test_work_that_can_never_run_is_refused_by_reason(model_dir: Path) -> None:
    engine, recorder = open_native(model_dir, kv_bytes=1 << 20)
    too_long = [5] * 4096
    too_large = [5] * (16 * engine.load().blocks_total)
    bad = [(1, too_long, "context_length_exceeded"), (2, too_large, "no_capacity"), (3, [512], "invalid_request_error")]
    for key, prompt, reason in bad:
        engine.handle(Submit(work(key, prompt), "generate"))
        engine.handle(ReserveBlocks(work(10 + key, prompt), 10_000))
        assert recorder.of(WorkFailed, key)[0].reason == reason
        assert recorder.of(ReserveRefused, 10 + key)[0].reason == reason
    assert "4097" in recorder.of(WorkFailed, 1)[0].message
    assert "4096" in recorder.of(WorkFailed, 1)[0].message
    assert_all_free(engine)
    engine.close()


def test_a_reservation_is_all_or_nothing_and_leaves_the_head_room(model_dir: Path) -> None:
    engine, recorder = open_native(model_dir, kv_bytes=1 << 20)
    blocks = engine.load().blocks_total
    engine.handle(ReserveBlocks(work(1, [5] * 16 * (blocks - 3)), 10_000))
    engine.handle(ReserveBlocks(work(2, [6] * 16 * 3), 10_000))
    assert len(recorder.of(Reserved, 1)[0].blocks) == blocks - 3
    assert recorder.of(ReserveRefused, 2)[0].reason == "no_capacity"
    assert engine.load().blocks_free == 3
    for command in (Cancel(Dispatch(1, 1)), WriterDone(Dispatch(1, 1))):
        engine.handle(command)
    assert_all_free(engine)
    engine.close()


# ---- cancels


def test_reserved_blocks_stay_until_request_and_writer_are_done_in_either_order(
    native: tuple[NativeEngine, Recorder],
) -> None:
    engine, recorder = native
    for key, order in ((1, (Cancel, WriterDone)), (2, (WriterDone, Cancel))):
        engine.handle(ReserveBlocks(work(key, PROMPT), 10_000))
        engine.handle(order[0](Dispatch(key, 1)))
        assert not recorder.of(Freed, key)
        engine.handle(order[1](Dispatch(key, 1)))
        assert len(recorder.of(Freed, key)) == 1
    generations = [event.generations for event in recorder.of(Reserved)]
    assert max(generations[1]) > max(generations[0])


def test_announced_blocks_of_a_cancelled_prefill_stay_until_the_sender_lets_go(model_dir: Path) -> None:
    engine, recorder = open_native(model_dir, {"prefill_chunk": 32})
    engine.handle(Submit(work(1, PROMPT), "prefill"))
    engine.step()
    engine.handle(Cancel(Dispatch(1, 1)))
    assert not engine.step()
    assert engine.load().blocks_free < engine.load().blocks_total
    engine.handle(ReleaseSource(Dispatch(1, 1)))
    assert len(recorder.of(Freed, 1)) == 1
    assert_all_free(engine)
    engine.close()


def test_one_choice_is_cancelled_and_the_others_go_on(native: tuple[NativeEngine, Recorder]) -> None:
    engine, recorder = native
    engine.handle(Submit(work(1, PROMPT, sampling(12), choices=(0, 1)), "generate"))
    for _ in range(4):
        engine.step()
    finish(engine, Cancel(Dispatch(1, 1), (0,)))
    tokens = recorder.tokens(1)
    assert len(tokens[0]) < len(tokens[1]) == 12


def test_a_cancel_that_comes_first_refuses_its_work(native: tuple[NativeEngine, Recorder]) -> None:
    engine, recorder = native
    finish(engine, Cancel(Dispatch(1, 1)), Submit(work(1, PROMPT), "generate"))
    assert recorder.of(WorkFailed, 1)[0].reason == "cancelled"
    engine.handle(Cancel(Dispatch(2, 1)))
    engine.handle(ReserveBlocks(work(2, PROMPT), 10_000))
    assert recorder.of(ReserveRefused, 2)[0].reason == "cancelled"


def test_repeated_commands_have_no_effect(native: tuple[NativeEngine, Recorder]) -> None:
    engine, recorder = native
    twice = Submit(work(1, PROMPT), "generate")
    finish(engine, twice, twice)
    assert len(recorder.tokens(1)[0]) == 8
    for command in (Activate(Dispatch(1, 1), ((0, 5),)), WriterDone(Dispatch(1, 1)), ReleaseSource(Dispatch(9, 9))):
        finish(engine, command)
    assert len(recorder.of(Freed, 1)) == 1


@pytest.mark.parametrize("seed", range(8))
def test_a_storm_of_commands_leaks_nothing_and_changes_no_token(model_dir: Path, seed: int) -> None:
    source = random.Random(seed)
    engine, recorder = open_native(model_dir, {"prefill_chunk": 32, "token_budget": 64}, kv_bytes=1 << 20)
    prompts = [[source.randrange(5, 500) for _ in range(source.choice([1, 16, 40, 90]))] for _ in range(4)]
    uncancelled: list[tuple[int, list[int], tuple[int, ...]]] = []
    for key in range(30):
        prompt, mode = source.choice(prompts), source.choice(["generate", "generate", "prefill", "reserve"])
        choices = source.choice([(0,), (0, 1)])
        one = work(key, prompt, sampling(20, temperature=1.0), choices=choices, priority=source.choice([0, 0, 1]))
        engine.handle(
            ReserveBlocks(one, 10_000)
            if mode == "reserve"
            else Submit(one, "prefill" if mode == "prefill" else "generate")
        )
        ends: list[Command] = []
        if mode == "prefill":
            ends = [Cancel(one.dispatch), ReleaseSource(one.dispatch)]
        elif mode == "reserve":
            ends = [Cancel(one.dispatch), WriterDone(one.dispatch)]
        elif source.random() < 0.4:
            ends = [Cancel(one.dispatch)]
        else:
            uncancelled.append((key, prompt, choices))
        for _ in range(source.randrange(4)):
            engine.step()
        source.shuffle(ends)
        for command in ends:
            engine.handle(command)
    finish(engine)
    assert_all_free(engine)
    freed = [event.dispatch for event in recorder.of(Freed)]
    assert len(freed) == len(set(freed))
    for key, prompt, choices in uncancelled:
        alone, told = open_native(model_dir)
        generate(alone, work(key, prompt, sampling(20, temperature=1.0), choices=choices))
        assert recorder.tokens(key) == told.tokens(key)
        alone.close()
    engine.close()


def test_kernels_that_are_asked_for_by_name_and_not_built_are_refused_with_what_there_is(
    reference: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    reference.save_pretrained(tmp_path / "model")
    load_kernels.cache_clear()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(build, "FOLDER", tmp_path)
            with pytest.raises(ConfigInvalid, match=r"engine\.kernels is avx2.* built and usable here are none"):
                open_native(tmp_path / "model", {"kernels": "avx2"})
    finally:
        load_kernels.cache_clear()
    engine, _ = open_native(tmp_path / "model", {"kernels": "avx2"})
    engine.close()
