"""The training run: a recipe in, trained weights out, with checkpoints that a later run of the same recipe resumes."""

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.disturbance import Disturbance, disturbed
from training.network import Shape, Weights, initial_weights, loss_and_gradients, next_token_loss
from training.optimizer import LearningRates, Moments, apply_gradients, initial_moments
from training.windows import Source, Stage, batches

log = logging.getLogger(__name__)

STEPS_PER_LOG_LINE = 20
STEPS_PER_CHECKPOINT = 100


class CheckpointMismatch(Exception):
    """The checkpoint file was written by another recipe."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the weights besides the text and the numeric library."""

    shape: Shape = field(default_factory=Shape)
    stages: tuple[Stage, ...] = (Stage(2700, 12, 256), Stage(140, 3, 1024), Stage(45, 2, 2048))
    rates: LearningRates = field(default_factory=LearningRates)
    warmup_steps: int = 30
    decay_from: float = 0.3
    tokens_per_pass: int = 4096
    seed: int = 2026
    disturbance: Disturbance | None = None

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def identity(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def rate_factor(self, step: int) -> float:
        """Return the share of the peak rate at `step` (from 1): linear warm-up, constant, linear decay to zero."""
        warm = min(1.0, step / self.warmup_steps)
        left = (self.steps + 1 - step) / (self.steps * (1 - self.decay_from))
        return min(warm, left, 1.0)


@dataclass(slots=True)
class Progress:
    """A training run after `step` updates."""

    weights: Weights
    moments: Moments
    step: int = 0


def fresh_progress(recipe: Recipe, start: Weights | None = None) -> Progress:
    """Return the progress before the first step, from random weights or a copy of `start`."""
    drawn = initial_weights(recipe.shape, torch.Generator().manual_seed(recipe.seed))
    weights = {name: start[name].detach().clone() if start else weight for name, weight in drawn.items()}
    return Progress(weights, initial_moments(weights))


def train(recipe: Recipe, sources: tuple[Source, ...], progress: Progress) -> Iterator[tuple[int, float]]:
    """Run the rest of the recipe on `progress`, in place; yield (step, loss in nats of its batch) after each update."""
    for weight in progress.weights.values():
        weight.requires_grad_()
    for windows in islice(batches(sources, recipe.stages, recipe.seed), progress.step, None):
        rows_per_pass = max(1, recipe.tokens_per_pass // (windows.shape[1] - 1))
        progress.step += 1
        inputs, targets = _example(recipe, windows, progress.step)
        loss = loss_and_gradients(recipe.shape, progress.weights, inputs, targets, rows_per_pass)
        rates = recipe.rates.scaled(recipe.rate_factor(progress.step))
        apply_gradients(progress.weights, progress.moments, rates, progress.step)
        yield progress.step, loss


def _example(recipe: Recipe, windows: Tensor, step: int) -> tuple[Tensor, Tensor]:
    if recipe.disturbance is None:
        return windows[:, :-1], windows[:, 1:]
    # Seeded by the step, so that a resumed run draws what the interrupted one would have drawn.
    return disturbed(windows, recipe.disturbance, torch.Generator().manual_seed(recipe.seed * 1_000_000 + step))


def run(recipe: Recipe, sources: tuple[Source, ...], checkpoint: Path | None, start: Weights | None = None) -> Weights:
    """Train to the end of the recipe, from the checkpoint where it exists, with a log line every few steps."""
    resumes = checkpoint is not None and checkpoint.exists()
    progress = load_checkpoint(recipe, checkpoint) if checkpoint and resumes else fresh_progress(recipe, start)
    started, average = time.monotonic(), 0.0
    for count, (step, loss) in enumerate(train(recipe, sources, progress), start=1):
        average = loss if count == 1 else 0.95 * average + 0.05 * loss
        if step % STEPS_PER_LOG_LINE == 0 or step == recipe.steps:
            elapsed_s = time.monotonic() - started
            log.info("step %d/%d loss %.3f %.0f s", step, recipe.steps, average, elapsed_s)
        if checkpoint and (step % STEPS_PER_CHECKPOINT == 0 or step == recipe.steps):
            save_checkpoint(recipe, progress, checkpoint)
    return {name: weight.detach() for name, weight in progress.weights.items()}


def save_checkpoint(recipe: Recipe, progress: Progress, path: Path) -> None:
    """Write the progress to `path` as safetensors; an interrupted write leaves the previous file."""
    moments = progress.moments
    tensors = {f"weight.{name}": weight.detach() for name, weight in progress.weights.items()}
    tensors |= {f"first.{name}": tensor for name, tensor in moments.first.items()}
    tensors |= {f"second.{name}": tensor for name, tensor in moments.second.items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(progress.step), "recipe": recipe.identity()})
    os.replace(partial, path)


def load_checkpoint(recipe: Recipe, path: Path) -> Progress:
    """Read the progress of the same recipe; raises CheckpointMismatch for another one."""
    parts: dict[str, Weights] = {"weight": {}, "first": {}, "second": {}}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        if metadata.get("recipe") != recipe.identity():
            raise CheckpointMismatch(f"{path} belongs to another recipe; remove it or name another file")
        for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
            part, _, name = key.partition(".")
            parts[part][name] = file.get_tensor(key)
    return Progress(parts["weight"], Moments(parts["first"], parts["second"]), int(metadata["step"]))


@torch.no_grad()
def held_out_loss(shape: Shape, weights: Weights, tokens: Tensor, length: int) -> float:
    """Return the mean loss in nats per token over consecutive windows of `length` tokens."""
    count = (len(tokens) - 1) // length
    windows = [tokens[i * length : (i + 1) * length + 1].long() for i in range(count)]
    return sum(next_token_loss(shape, weights, window[None]).item() for window in windows) / count
