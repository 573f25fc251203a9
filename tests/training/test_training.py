"""Tests of the training run on a network of a few thousand weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.network import Shape, Weights, initial_weights, next_token_loss
from training.optimizer import LearningRates, orthogonalised
from training.train import (
    CheckpointMismatch,
    Recipe,
    fresh_progress,
    held_out_loss,
    load_checkpoint,
    run,
    save_checkpoint,
    train,
)
from training.windows import Source, Stage, batches

SHAPE = Shape(vocabulary=64, hidden=32, intermediate=64, layers=2, heads=2, kv_heads=1, head_dim=16, max_positions=64)
RECIPE = Recipe(shape=SHAPE, stages=(Stage(30, 4, 16), Stage(10, 2, 32)), warmup_steps=4, tokens_per_pass=64, seed=5)
COUNTING = Source(torch.arange(2_000, dtype=torch.int32) % 64, share=0.75)
PAIRS = Source(torch.arange(2_000, dtype=torch.int32) // 2 % 64, share=0.25)
SOURCES = (COUNTING, PAIRS)


def test_a_few_seeded_steps_halve_the_loss() -> None:
    losses = [loss for _, loss in train(RECIPE, SOURCES, fresh_progress(RECIPE))]
    assert losses[0] == pytest.approx(4.16, abs=0.1)  # ln 64: the first guess is uniform
    assert sum(losses[-5:]) / 5 < losses[0] / 2


def test_two_runs_of_one_recipe_give_the_same_weights() -> None:
    assert_equal(run(RECIPE, SOURCES, None), run(RECIPE, SOURCES, None))


def test_a_run_resumed_from_a_checkpoint_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    path = tmp_path / "progress.safetensors"
    interrupted = fresh_progress(RECIPE)
    for step, _ in train(RECIPE, SOURCES, interrupted):
        if step == 33:
            break
    save_checkpoint(RECIPE, interrupted, path)
    assert_equal(run(RECIPE, SOURCES, path), run(RECIPE, SOURCES, None))


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "progress.safetensors"
    save_checkpoint(RECIPE, fresh_progress(RECIPE), path)
    with pytest.raises(CheckpointMismatch):
        load_checkpoint(replace(RECIPE, seed=6), path)


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    factors = [RECIPE.rate_factor(step) for step in range(1, RECIPE.steps + 2)]
    assert factors[0] == 0.25
    assert max(factors) == 1.0
    assert factors[-1] == 0.0
    assert factors[12:] == sorted(factors[12:], reverse=True)


def test_splitting_a_batch_into_passes_does_not_change_its_loss() -> None:
    whole = replace(RECIPE, tokens_per_pass=4096)
    first = next(train(RECIPE, SOURCES, fresh_progress(RECIPE)))
    assert first == pytest.approx(next(train(whole, SOURCES, fresh_progress(whole))))


def test_every_window_of_a_source_is_drawn_once_per_epoch() -> None:
    only = Source(torch.arange(101, dtype=torch.int32), share=1.0)
    drawn = torch.cat(list(batches((only,), (Stage(9, 1, 10),), seed=1)))
    assert len(set(drawn[:, 0].tolist())) == 9


def test_batches_follow_the_lengths_of_their_stages() -> None:
    shapes = [tuple(batch.shape) for batch in batches(SOURCES, (Stage(1, 4, 16), Stage(2, 2, 32)), seed=1)]
    assert shapes == [(4, 17), (2, 33), (2, 33)]


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_scaled_rates_keep_their_weight_decay() -> None:
    assert LearningRates(0.2, 0.1, 0.05).scaled(0.5) == LearningRates(0.1, 0.05, 0.05)


def test_fresh_weights_guess_uniformly() -> None:
    weights = initial_weights(SHAPE, torch.Generator().manual_seed(0))
    windows = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(1))
    assert next_token_loss(SHAPE, weights, windows).item() == pytest.approx(4.16, abs=0.1)
    assert held_out_loss(SHAPE, weights, windows.flatten(), 16) == pytest.approx(4.16, abs=0.1)


def assert_equal(left: Weights, right: Weights) -> None:
    assert left.keys() == right.keys()
    for name, weight in left.items():
        assert torch.equal(weight, right[name]), name
