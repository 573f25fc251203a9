"""Tests of the later phases of the training: disturbed windows, greedy text, its blemishes and their cure."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from training.blemishes import Spelling, looping, repeated
from training.disturbance import IGNORED, Disturbance, disturbed
from training.nearest_text import nearest_text
from training.network import Shape, empty_past, hidden_states
from training.own_text import Correction, Judge, PromptText, Samples, corrected, correction_loss, greedy, prompt_batches
from training.polishing import whole_lines
from training.readability import longest_loop
from training.tokenizer import train_tokenizer
from training.train import Recipe, fresh_progress, run, train
from training.windows import Source, Stage, batches

SHAPE = Shape(vocabulary=64, hidden=32, intermediate=64, layers=2, heads=2, kv_heads=1, head_dim=16, max_positions=64)
RECIPE = Recipe(shape=SHAPE, stages=(Stage(30, 4, 16),), warmup_steps=4, tokens_per_pass=64, seed=5)
COUNTING = Source(torch.arange(2_000, dtype=torch.int32) % 64, share=1.0)
CORRECTION = Correction(
    rounds=5, prompts=8, prompt_tokens=(2, 3), sample_tokens=40, run_length=4, rows=4, peak_rate=0.5
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_spliced_row_begins_with_another_row_and_its_beginning_is_no_target() -> None:
    windows = torch.arange(40).view(2, 20)
    inputs, targets = disturbed(windows, Disturbance(spliced=1.0, shortest=3, longest=3, replaced=0.0), seeded(1))
    assert inputs[0].tolist() == [*range(20, 23), *range(3, 19)]
    assert targets[0].tolist() == [IGNORED] * 3 + list(range(4, 20))


def test_replaced_tokens_leave_the_targets_as_they_were() -> None:
    windows = torch.arange(2_020).view(4, 505)
    inputs, targets = disturbed(windows, Disturbance(spliced=0.0, replaced=0.25), seeded(1))
    assert torch.equal(targets, windows[:, 1:])
    assert (inputs != windows[:, :-1]).float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_disturbing_draws_the_same_for_the_same_seed() -> None:
    windows = torch.arange(2_020).view(4, 505)
    once, again, other = (disturbed(windows, Disturbance(), seeded(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_a_disturbed_recipe_still_learns_and_repeats_bit_by_bit() -> None:
    recipe = replace(RECIPE, disturbance=Disturbance(shortest=1, longest=3))
    once, again = (list(train(recipe, (COUNTING,), fresh_progress(recipe))) for _ in range(2))
    assert once == again
    assert once[-1][1] < once[0][1] - 0.5


def test_a_second_phase_starts_from_the_weights_of_the_first() -> None:
    first = run(RECIPE, (COUNTING,), None)
    _, loss = next(train(RECIPE, (COUNTING,), fresh_progress(RECIPE, first)))
    assert loss < 2.5  # fresh weights: ln 64 = 4.2


def test_a_later_stage_of_the_same_length_continues_the_epoch() -> None:
    only = Source(torch.arange(101, dtype=torch.int32), share=1.0)
    stages = (Stage(4, 1, 10), Stage(1, 1, 20), Stage(5, 1, 10))
    drawn = [batch for batch in batches((only,), stages, seed=1) if batch.shape[1] == 11]
    assert len({int(batch[0, 0]) for batch in drawn}) == 9


def test_states_computed_token_by_token_equal_those_computed_at_once() -> None:
    weights = run(RECIPE, (COUNTING,), None)
    tokens = torch.randint(0, 64, (3, 12), generator=seeded(2))
    past = empty_past(SHAPE, 3)
    parts = [hidden_states(SHAPE, weights, tokens[:, :5], past)]
    parts += [hidden_states(SHAPE, weights, tokens[:, [place]], past) for place in range(5, 12)]
    torch.testing.assert_close(torch.cat(parts, dim=1), hidden_states(SHAPE, weights, tokens), atol=1e-4, rtol=1e-4)


def test_greedy_text_is_the_argmax_of_the_logits_at_every_place() -> None:
    weights = run(RECIPE, (COUNTING,), None)
    written = greedy(SHAPE, weights, torch.tensor([[1, 2, 3], [40, 41, 42]]), 10)
    logits = hidden_states(SHAPE, weights, written) @ weights["model.embed_tokens.weight"].T
    assert torch.equal(logits.argmax(-1)[:, 2:-1], written[:, 3:])


def test_barred_tokens_are_never_written() -> None:
    weights = run(RECIPE, (COUNTING,), None)
    prompt = torch.tensor([[61, 62]])
    assert 3 in greedy(SHAPE, weights, prompt, 8)[0, 2:]  # the numbers start again at 0 behind 63
    assert greedy(SHAPE, weights, prompt, 8, barred=8)[0, 2:].min() >= 8


def test_a_token_that_completes_a_run_seen_before_is_a_repetition() -> None:
    assert repeated([1, 2, 3, 9, 1, 2, 3, 4], run_length=3) == {6}
    assert repeated([1, 2, 3, 9, 1, 2, 4, 3], run_length=3) == set()


def test_a_run_said_over_and_over_is_a_loop_once_it_is_long_enough() -> None:
    assert looping([9, *[1, 2, 3, 4] * 2, 5]) == {8}
    assert looping([7] * 10) == {7, 8, 9}
    assert looping([0, 1] * 3) == set()


def test_what_goes_on_with_an_unknown_word_is_broken_but_not_its_first_token_nor_the_last_word() -> None:
    spelling = Spelling(("Ġsl", "ice", "ized", "Ġtime", ".", "st"), frozenset({"slice", "time", "sliced"}))
    assert spelling.broken([0, 1, 3, 4]) == set()
    assert spelling.broken([0, 2, 3, 4, 5, 1, 1, 4]) == {1, 5, 6}
    assert spelling.broken([3, 0, 2]) == set()  # "slized" may go on
    assert spelling.broken([]) == set()


def test_a_repetition_costs_more_the_likelier_it_is() -> None:
    weights = run(RECIPE, (COUNTING,), None)
    tokens = torch.arange(16)[None] + 8

    def loss(likely: Tensor, repeats: bool) -> float:
        targets = torch.full_like(likely, IGNORED)
        targets[0, 0] = 9
        marks = torch.full_like(likely, repeats, dtype=torch.bool)
        return correction_loss(SHAPE, weights, Samples(likely, targets, marks), CORRECTION).item()

    assert loss(tokens, repeats=True) > loss(tokens, repeats=False)
    likely, unlikely = (loss(some, True) - loss(some, False) for some in (tokens, tokens.flip(1)))
    assert likely > unlikely


def test_a_barred_token_costs_where_it_is_likely_whether_it_was_written_or_not() -> None:
    weights = run(RECIPE, (COUNTING,), None)
    bars = replace(CORRECTION, barred=4)

    def cost(first: int) -> float:
        tokens = torch.arange(first, first + 8)[None] % 64
        targets = torch.full_like(tokens, IGNORED)
        targets[0, 0] = first + 1
        samples = Samples(tokens, targets, torch.zeros_like(tokens, dtype=torch.bool))
        plain, barred = (correction_loss(SHAPE, weights, samples, some).item() for some in (CORRECTION, bars))
        return barred - plain

    assert cost(60) > cost(20) + 0.1  # behind 63 come 0, 1, 2, 3


def test_the_nearest_text_goes_on_after_the_longest_equal_run() -> None:
    text = nearest_text(torch.tensor([1, 2, 3, 4, 5, 9, 2, 3, 7, 8, 3, 7, 0]))
    found = text.next_tokens(torch.tensor([[1, 2, 3], [9, 2, 3], [8, 2, 3], [60, 61, 3]]))
    assert found[:2, 2].tolist() == [4, 7]
    assert found[3, 2] == 7  # after 3 alone, 7 is the most frequent
    assert found[2, 0] == 3


def test_only_the_text_behind_a_prompt_is_judged_and_a_repetition_is_no_target() -> None:
    judge = Judge(nearest_text(torch.arange(50)), replace(CORRECTION, run_length=3))
    samples = judge.judged(torch.tensor([[1, 2, 3, 4, 5, 6, 4, 5, 6, 7]]), prompt_length=3)
    assert samples.targets[0].tolist() == [IGNORED, IGNORED, 4, 5, 6, 7, 5, 6, IGNORED, 8]
    assert samples.unwanted[0].tolist() == [False] * 8 + [True, False]


def test_with_a_spelling_loops_and_broken_words_are_unwanted_and_a_barred_token_is_no_target() -> None:
    spelling = Spelling((" ",) * 20 + ("a", "b") + (" ",) * 28, frozenset({"aa"}))
    judge = Judge(nearest_text(torch.arange(50)), replace(CORRECTION, run_length=8, barred=8), spelling)
    samples = judge.judged(torch.tensor([[6, 20, 21, 5, 7, 20, 20, 30, 31, 30, 31, 30, 31, 30, 31]]), prompt_length=1)
    assert samples.unwanted[0].nonzero().flatten().tolist() == [2, 14]
    assert samples.targets[0, :6].tolist() == [IGNORED, 21, IGNORED, IGNORED, 8, 21]


def test_prompts_take_the_lengths_in_turn_and_come_from_the_text() -> None:
    text = PromptText(torch.arange(500, dtype=torch.int32), range(500))
    lengths = []
    for prompts in prompt_batches(text, CORRECTION, seed=1):
        lengths.append(prompts.shape[1])
        assert torch.equal(prompts - prompts[:, :1], torch.arange(lengths[-1]).expand_as(prompts))
    assert lengths == [2, 3, 2, 3, 2]


def test_a_prompt_of_whole_lines_ends_with_a_line_break() -> None:
    tokenizer = train_tokenizer(["one line\n    and another\n\n"] * 3, 280)
    tokens = torch.tensor(tokenizer.encode("one line\n    and another\n\none").ids)
    text = whole_lines(tokenizer, tokens)
    assert [tokenizer.decode(tokens[:end].tolist()) for end in text.ends] == [
        "one line\n    ",
        "one line\n    and another\n\n",
    ]


def test_prompts_end_where_the_text_lets_them() -> None:
    text = PromptText(torch.arange(500, dtype=torch.int32), (1, 20, 30, 40))
    drawn = torch.cat([prompts[:, -1] for prompts in prompt_batches(text, CORRECTION, seed=1)])
    assert set(drawn.tolist()) == {19, 29, 39}  # before 1 there is no room for a prompt


def test_corrections_make_repetition_rarer_in_greedy_text(caplog: pytest.LogCaptureFixture) -> None:
    source = Source(torch.arange(2_000, dtype=torch.int32) % 8, share=1.0)  # its text is one loop of eight tokens
    weights = run(RECIPE, (source,), None)
    with caplog.at_level(logging.INFO, "training.own_text"):
        corrected(CORRECTION, RECIPE, weights, (source,), PromptText(source.tokens, range(2_000)))
    shares = [float(message.split()[2]) for message in caplog.messages]
    assert shares[0] > 0.5
    assert shares[-1] < shares[0] - 0.1


@pytest.mark.parametrize(
    ("tokens", "length"),
    [([], 0), ([1, 2, 3], 0), ([7] * 6, 0), ([7] * 12, 12), ([9, *[1, 2, 3, 4] * 2, 5], 8), ([1, 2, 3, 4, 1, 2], 0)],
)
def test_the_longest_loop_is_a_run_said_twice_or_more(tokens: list[int], length: int) -> None:
    assert longest_loop(tokens) == length
