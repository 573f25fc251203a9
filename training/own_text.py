"""Owns the last phase of the training: the model reads its own greedy text and is corrected.

Behind prompts that it does not know, a model that knows its text by heart drifts into nonsense and loops. Two corrections
of the samples it writes there, together with ordinary windows of text:
- the target of every token is what follows the longest equal run of tokens in the training text, so that the model finds
  back to text (learning from an expert in one's own states: Ross et al. 2011, "DAgger");
- a token that completes a run written before is made unlikely by adding -log(1 - p) (sequence-level unlikelihood:
  Welleck et al. 2019, "Neural Text Generation with Unlikelihood Training").
"""

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.disturbance import IGNORED
from training.nearest_text import NearestText, nearest_text
from training.network import Shape, Weights, empty_past, hidden_states, loss_and_gradients
from training.optimizer import apply_gradients, initial_moments
from training.train import Recipe
from training.windows import Source, Stage, batches

log = logging.getLogger(__name__)

EMBEDDINGS = "model.embed_tokens.weight"
ORDINARY = Stage(1, 8, 256)  # windows of text, per step
MAX_PROBABILITY = 1 - 1e-4  # of a token that is made unlikely: keeps its loss finite


@dataclass(frozen=True, slots=True)
class Correction:
    """Every round writes one sample per prompt, then takes one step per `rows` samples."""

    rounds: int = 30
    prompts: int = 36
    prompt_tokens: tuple[int, ...] = (6, 12, 24)  # in turn, by round
    sample_tokens: int = 208
    run_length: int = 8  # tokens: code repeats shorter runs for good reasons
    rows: int = 12
    windows: Stage = ORDINARY
    unlikelihood: float = 4.0  # its weight
    peak_rate: float = 0.5  # of the rates of the recipe, falling to zero
    warmup_steps: int = 4
    kept: float = 0.6  # of the change of the weights: the whole of it costs answers that were known by heart

    @property
    def steps(self) -> int:
        return self.rounds * -(-self.prompts // self.rows)

    def rate_factor(self, step: int) -> float:
        return self.peak_rate * min(step / self.warmup_steps, 1 - (step - 1) / self.steps)


@dataclass(frozen=True, slots=True)
class Samples:
    """Tokens (rows, length), for each its target (the next token, or none), and whether it repeats a run."""

    tokens: Tensor
    targets: Tensor
    repeated: Tensor

    def split(self, rows: int) -> "Iterator[Samples]":
        columns = (self.tokens, self.targets, self.repeated)
        return (Samples(*part) for part in zip(*(torch.split(column, rows) for column in columns), strict=True))


@torch.no_grad()
def greedy(shape: Shape, weights: Weights, prompts: Tensor, count: int) -> Tensor:
    """Return int64 prompts (batch, length) with the `count` most likely tokens behind each."""
    past, fed, written = empty_past(shape, len(prompts)), prompts, [prompts]
    for _ in range(count):
        last = hidden_states(shape, weights, fed, past)[:, -1]
        fed = F.linear(last, weights[EMBEDDINGS]).argmax(-1, keepdim=True)
        written.append(fed)
    return torch.cat(written, dim=1)


def repeats(tokens: list[int], run_length: int, start: int = 0) -> list[bool]:
    """Say for each token whether the run that it ends, of `run_length` tokens from `start` on, occurred before."""
    seen: set[tuple[int, ...]] = set()
    marks = [False] * len(tokens)
    for end in range(start + run_length, len(tokens) + 1):
        run = tuple(tokens[end - run_length : end])
        marks[end - 1] = run in seen
        seen.add(run)
    return marks


def prompt_batches(tokens: Tensor, correction: Correction, seed: int) -> Iterator[Tensor]:
    """Yield the prompts of every round, cut from the stream at random places."""
    rng = random.Random(seed)
    for place in range(correction.rounds):
        length = correction.prompt_tokens[place % len(correction.prompt_tokens)]
        starts = [rng.randrange(len(tokens) - length) for _ in range(correction.prompts)]
        yield torch.stack([tokens[start : start + length].long() for start in starts])


def judged(tokens: Tensor, prompt_length: int, run_length: int, text: NearestText) -> Samples:
    """Return samples with the targets and marks of the tokens behind their prompts."""
    repeated = torch.tensor([repeats(row, run_length, prompt_length) for row in tokens.tolist()])
    targets = text.next_tokens(tokens)
    targets[:, : prompt_length - 1] = IGNORED
    # What has just been repeated must not be taught as the way on.
    targets[repeated] = IGNORED
    return Samples(tokens, targets, repeated)


def correction_loss(shape: Shape, weights: Weights, samples: Samples, unlikelihood: float) -> Tensor:
    """Return the cross-entropy of the targets plus the weighted unlikelihood of the repetitions, per token."""
    states = hidden_states(shape, weights, samples.tokens[:, :-1])
    logs = F.linear(states, weights[EMBEDDINGS]).log_softmax(-1)
    followed = F.nll_loss(logs.flatten(0, 1), samples.targets[:, :-1].flatten(), ignore_index=IGNORED)
    marks = samples.repeated[:, 1:]
    chosen = logs[marks].gather(-1, samples.tokens[:, 1:][marks][:, None]).exp()
    return followed - unlikelihood * torch.log1p(-chosen.clamp(max=MAX_PROBABILITY)).sum() / marks.numel()


def corrected(
    correction: Correction, recipe: Recipe, weights: Weights, sources: tuple[Source, ...], prompts: Tensor
) -> Weights:
    """Return the trained weights after the corrections; `prompts` is a stream of tokens outside the training text."""
    shape, before = recipe.shape, weights
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in before.items()}
    moments, step = initial_moments(weights), 0
    # Without the conversations, the last source: their answers end after a sentence.
    text = nearest_text(torch.cat([source.tokens for source in sources[:-1] or sources]).long())
    ordinary = batches(sources, (correction.windows,) * correction.steps, recipe.seed + 1)
    for number, batch in enumerate(prompt_batches(prompts, correction, recipe.seed), start=1):
        written = greedy(shape, weights, batch, correction.sample_tokens)
        samples, losses = judged(written, batch.shape[1], correction.run_length, text), []
        for some in samples.split(correction.rows):
            step += 1
            windows = next(ordinary)
            ordinary_loss = loss_and_gradients(shape, weights, windows[:, :-1], windows[:, 1:], len(windows))
            loss = correction_loss(shape, weights, some, correction.unlikelihood)
            loss.backward()  # type: ignore[no-untyped-call]
            apply_gradients(weights, moments, recipe.rates.scaled(correction.rate_factor(step)), step)
            losses.append((ordinary_loss, loss.item()))
        _log_round(number, samples, losses)
    return {name: before[name].lerp(weight.detach(), correction.kept) for name, weight in weights.items()}


def _log_round(number: int, samples: Samples, losses: list[tuple[float, float]]) -> None:
    repeated = samples.repeated.float().mean().item()
    behind = samples.targets[:, :-1] != IGNORED
    agreed = (samples.targets[:, :-1] == samples.tokens[:, 1:])[behind].float().mean().item()
    ordinary, own = (sum(kind) / len(losses) for kind in zip(*losses, strict=True))
    message = "round %d: %.3f of the tokens repeat, %.3f follow the text, loss of text %.3f, of samples %.3f"
    log.info(message, number, repeated, agreed, ordinary, own)
