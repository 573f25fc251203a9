"""The command that rebuilds the model of the chunk questions: `python -m training.chunk_model --out models/pdserve-chunks`."""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from training.chunk_questions import FULL, UNKNOWN, WORDS, Layout, Question, Text, ask, draw_text, questions
from training.model_directory import rounded, write_model_directory
from training.network import Shape, Weights, hidden_states, initial_weights
from training.optimizer import LearningRates, apply_gradients, initial_moments
from training.tokenizer import END_OF_TEXT

log = logging.getLogger(__name__)

EMBEDDING = "model.embed_tokens.weight"
IGNORED = -100  # the label that torch's cross_entropy leaves out
STEPS_PER_LOG_LINE = 50
OWN_SHARE = 0.3  # of a compound word's vector, beside its parts
SPACE = "▁"


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of training on texts of one layout: `steps` batches of `rows` texts, each asked about `asks` times."""

    layout: Layout
    rows: int
    asks: int
    steps: int


# Short texts first: attention that finds one word among six is learned in minutes, among hundreds it is not found at all.
CURRICULUM = (
    Stage(Layout(chunks=2, chunk_tokens=8, people=3, records_per_chunk=3), rows=24, asks=16, steps=150),
    Stage(Layout(chunks=2, chunk_tokens=16, people=6, records_per_chunk=6), rows=24, asks=16, steps=250),
    Stage(Layout(chunks=3, chunk_tokens=24, people=8, records_per_chunk=6), rows=24, asks=16, steps=80),
    Stage(Layout(chunks=4, chunk_tokens=40, people=12, records_per_chunk=7), rows=12, asks=32, steps=100),
    Stage(FULL, rows=8, asks=32, steps=320),
)


def _shape() -> Shape:
    return Shape(
        vocabulary=1024, hidden=128, intermediate=384, heads=4, kv_heads=2, max_positions=1024, rope_theta=100_000.0
    )


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the weights besides the numeric library."""

    shape: Shape = field(default_factory=_shape)
    stages: tuple[Stage, ...] = CURRICULUM
    rates: LearningRates = field(default_factory=lambda: LearningRates(0.01, 1e-3, 0.02))
    warmup_steps: int = 50
    decay_from: float = 0.4
    embedding_std: float = 0.8
    matrix_std: float = 0.07
    final_norm: float = 0.05
    matching_layers: tuple[int, ...] = (2, 3)
    seed: int = 2026

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def rate_factor(self, step: int) -> float:
        """Return the share of the peak rate at `step` (from 1): linear warm-up, constant, linear decay to zero."""
        left = (self.steps + 1 - step) / (self.steps * (1 - self.decay_from))
        return min(step / self.warmup_steps, left, 1.0)


@dataclass(frozen=True, slots=True)
class Batch:
    """Three tensors (rows, length) int64: tokens; and the token to be predicted after each, IGNORED where none is, by the whole
    network (`answers`) and by its first layer alone (`readings`)."""

    tokens: Tensor
    answers: Tensor
    readings: Tensor


def batches(recipe: Recipe) -> Iterator[Batch]:
    """Yield every batch of the training; the same recipe gives the same batches."""
    rng = random.Random(recipe.seed)
    for stage in recipe.stages:
        for _ in range(stage.steps):
            rows = [_lesson(rng, draw_text(rng, stage.layout), stage.asks) for _ in range(stage.rows)]
            yield Batch(*(torch.tensor(column) for column in zip(*rows, strict=True)))


def _lesson(rng: random.Random, text: Text, asks: int) -> tuple[list[int], list[int], list[int]]:
    """Return a text with many questions and answers behind it, the answers as labels, and the records' colours as labels."""
    tokens = [token for chunk in text.chunks for token in chunk]
    answers = [IGNORED] * len(tokens)
    readings = [IGNORED] * (len(tokens) + 3 * asks)
    for record in text.records:
        readings[record.place] = record.colour
    for record in rng.choices(text.records, k=asks):
        tokens += [*ask(record.item), record.colour]
        answers += [IGNORED, record.colour, IGNORED]
    return tokens, answers, readings


def loss_of(shape: Shape, weights: Weights, batch: Batch) -> Tensor:
    """Return the sum of three mean cross-entropies in nats, as a scalar to be differentiated.

    Answers are asked of the whole network. Readings, of the first layer, make the model join two chunks while it reads, as
    large models do, and not only once it is asked: otherwise a question could do both steps itself, and reuse of chunks would
    cost nothing. Pauses, of the first two layers, let an asked item be nothing but itself so far: CacheBlend computes these
    layers for all tokens, and a question that found its record in them would show nothing of what is reused after them.
    """
    pauses = torch.where(batch.answers != IGNORED, batch.tokens, IGNORED)
    return (
        _labelled_loss(shape, weights, batch.tokens, batch.answers)
        + _labelled_loss(replace(shape, layers=1), weights, batch.tokens, batch.readings)
        + _labelled_loss(replace(shape, layers=2), weights, batch.tokens, pauses)
    )


def _labelled_loss(shape: Shape, weights: Weights, tokens: Tensor, labels: Tensor) -> Tensor:
    labelled = labels != IGNORED
    logits = F.linear(hidden_states(shape, weights, tokens)[labelled], weights[EMBEDDING])
    return F.cross_entropy(logits, labels[labelled])


def fresh_weights(recipe: Recipe) -> Weights:
    """Return the weights before training, which start out able to find a word by a part of it; little is learned otherwise.

    A word of two parts starts near the sum of its parts' vectors. In the matching layers queries start equal to keys, so that
    equal parts attract each other (after Trockman and Kolter 2023, "Mimetic initialization of self-attention layers"): there
    a question finds its record. Embeddings are large, so that these layers still see the word, and the final norm is small,
    so that the first guess is not far from uniform.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    weights = initial_weights(recipe.shape, generator)
    for weight in weights.values():
        if weight.dim() == 2 and weight.any():
            weight.normal_(0.0, recipe.matrix_std, generator=generator)
    weights[EMBEDDING] = _compound(torch.randn(weights[EMBEDDING].shape, generator=generator) * recipe.embedding_std)
    weights["model.norm.weight"].fill_(recipe.final_norm)
    for layer in recipe.matching_layers:
        key = weights[f"model.layers.{layer}.self_attn.k_proj.weight"].view(recipe.shape.kv_heads, 1, -1)
        query = weights[f"model.layers.{layer}.self_attn.q_proj.weight"]
        query.copy_(key.expand(-1, recipe.shape.heads // recipe.shape.kv_heads, -1).reshape(query.shape))
    return weights


def _compound(embedding: Tensor) -> Tensor:
    place_of = {word: place for place, word in enumerate(WORDS)}
    compounded = embedding.clone()
    for word, place in place_of.items():
        parts = word.replace("=", ":").split(":")
        if len(parts) == 2:
            own, first, second = (embedding[row] for row in (place, place_of[parts[0]], place_of[parts[1]]))
            compounded[place] = OWN_SHARE * own + first + second
    return compounded


def train(recipe: Recipe, weights: Weights) -> Iterator[tuple[int, float]]:
    """Run the recipe on `weights`, in place; yield (step, loss in nats of its batch) after each update."""
    moments = initial_moments(weights)
    for weight in weights.values():
        weight.requires_grad_()
    for step, batch in enumerate(batches(recipe), start=1):
        loss = loss_of(recipe.shape, weights, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        apply_gradients(weights, moments, recipe.rates.scaled(recipe.rate_factor(step)), step)
        yield step, loss.item()


@torch.no_grad()
def accuracy(shape: Shape, weights: Weights, asked: list[Question]) -> float:
    """Return the share of questions whose answer is the most likely next token after a prefill of all tokens."""
    right = 0
    for question in asked:
        tokens = [token for chunk in question.chunks for token in chunk] + question.question
        last = hidden_states(shape, weights, torch.tensor([tokens]))[0, -1]
        right += int((weights[EMBEDDING] @ last).argmax()) == question.answer
    return right / len(asked)


def chunk_tokenizer() -> Tokenizer:
    """Return the tokenizer of the questions: words between spaces, any other word unknown."""
    vocabulary = {word if word.startswith("<|") else SPACE + word: place for place, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True), AddedToken(UNKNOWN, special=True)])
    return tokenizer


def build(recipe: Recipe, out: Path) -> None:
    """Train by the recipe and write the model directory; the log carries what the model card quotes."""
    weights = fresh_weights(recipe)
    started_wall_s, started_cpu_s, average = time.monotonic(), time.process_time(), 0.0
    for step, loss in train(recipe, weights):
        average = loss if step == 1 else 0.95 * average + 0.05 * loss
        if step % STEPS_PER_LOG_LINE == 0 or step == recipe.steps:
            wall_s, cpu_s = time.monotonic() - started_wall_s, time.process_time() - started_cpu_s
            log.info("step %d/%d loss %.3f, %.0f s, %.0f s of CPU", step, recipe.steps, average, wall_s, cpu_s)
    stored = rounded(weights)
    write_model_directory(out, recipe.shape, chunk_tokenizer(), stored)
    asked = list(questions(recipe.seed + 1, 1_000, FULL))
    trained = {name: weight.detach() for name, weight in weights.items()}
    for label, measured in (("float32", trained), ("stored bfloat16", {n: w.float() for n, w in stored.items()})):
        share = accuracy(recipe.shape, measured, asked)
        log.info("%s weights answer %.1f %% of %d fresh questions", label, 100 * share, len(asked))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the model that answers the chunk questions, on CPU.")
    parser.add_argument("--out", type=Path, default=Path("models/pdserve-chunks"), help="the model directory to write")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (results differ in the last bits)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    build(Recipe(), arguments.out)


if __name__ == "__main__":
    main()
