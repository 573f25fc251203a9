"""Owns the third phase of the training: the model reads its own greedy text and is corrected. The fourth runs the same code.

Behind prompts that it does not know, a model that knows its text by heart drifts into nonsense and loops. Two corrections
of the samples it writes there, together with ordinary windows of text:
- the target of every token is what follows the longest equal run of tokens in the training text, so that the model finds
  back to text (learning from an expert in one's own states: Ross et al. 2011, "DAgger");
- a token that completes a run written before is made unlikely by adding -log(1 - p) (sequence-level unlikelihood:
  Welleck et al. 2019, "Neural Text Generation with Unlikelihood Training"). In the fourth phase so are tokens of loops and
  of broken words, and at every place the special tokens, which no document contains.
"""

import logging
import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.blemishes import Spelling, looping, repeated
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
    barred: int = 0  # first tokens of the vocabulary that a document does not write: the special ones
    kept: float = 0.6  # of the change of the weights: the whole of it costs answers that were known by heart

    @property
    def steps(self) -> int:
        return self.rounds * -(-self.prompts // self.rows)

    def rate_factor(self, step: int) -> float:
        return self.peak_rate * min(step / self.warmup_steps, 1 - (step - 1) / self.steps)


@dataclass(frozen=True, slots=True)
class Samples:
    """Tokens (rows, length), for each its target (the next token, or none), and whether it is unwanted."""

    tokens: Tensor
    targets: Tensor
    unwanted: Tensor

    def split(self, rows: int) -> "Iterator[Samples]":
        columns = (self.tokens, self.targets, self.unwanted)
        return (Samples(*part) for part in zip(*(torch.split(column, rows) for column in columns), strict=True))


@torch.no_grad()
def greedy(shape: Shape, weights: Weights, prompts: Tensor, count: int, barred: int = 0) -> Tensor:
    """Return int64 prompts (batch, length) with the `count` most likely tokens behind each, the first `barred` left out."""
    past, fed, written = empty_past(shape, len(prompts)), prompts, [prompts]
    for _ in range(count):
        last = hidden_states(shape, weights, fed, past)[:, -1]
        fed = F.linear(last, weights[EMBEDDINGS][barred:]).argmax(-1, keepdim=True) + barred
        written.append(fed)
    return torch.cat(written, dim=1)


@dataclass(frozen=True, slots=True)
class PromptText:
    """A stream of tokens outside the training text, and the places, in order, before which a prompt may end."""

    tokens: Tensor
    ends: Sequence[int]

    def drawn(self, length: int, rng: random.Random) -> Tensor:
        end = rng.choice(self.ends[bisect_left(self.ends, length) :])
        return self.tokens[end - length : end].long()


def prompt_batches(text: PromptText, correction: Correction, seed: int) -> Iterator[Tensor]:
    """Yield the prompts of every round, cut from the text at random places."""
    rng = random.Random(seed)
    for place in range(correction.rounds):
        length = correction.prompt_tokens[place % len(correction.prompt_tokens)]
        yield torch.stack([text.drawn(length, rng) for _ in range(correction.prompts)])


@dataclass(frozen=True, slots=True)
class Judge:
    """Says what should follow each token of a sample, and which of its tokens are unwanted."""

    text: NearestText
    correction: Correction
    spelling: Spelling | None = None

    def judged(self, tokens: Tensor, prompt_length: int) -> Samples:
        """Return samples with the targets and marks of the tokens behind their prompts."""
        unwanted = torch.zeros(tokens.shape, dtype=torch.bool)
        for marks, row in zip(unwanted, tokens[:, prompt_length:].tolist(), strict=True):
            marks[[prompt_length + place for place in sorted(self._blemishes(row))]] = True
        targets = self.text.next_tokens(tokens)
        targets[:, : prompt_length - 1] = IGNORED
        targets[targets < self.correction.barred] = IGNORED
        # What has just been repeated must not be taught as the way on.
        targets[unwanted] = IGNORED
        return Samples(tokens, targets, unwanted)

    def _blemishes(self, written: list[int]) -> set[int]:
        found = repeated(written, self.correction.run_length)
        return found | looping(written) | self.spelling.broken(written) if self.spelling else found


def correction_loss(shape: Shape, weights: Weights, samples: Samples, correction: Correction) -> Tensor:
    """Return the cross-entropy of the targets plus the weighted unlikelihood of what is unwanted or barred, per token."""
    states = hidden_states(shape, weights, samples.tokens[:, :-1])
    logs = F.linear(states, weights[EMBEDDINGS]).log_softmax(-1)
    followed = F.nll_loss(logs.flatten(0, 1), samples.targets[:, :-1].flatten(), ignore_index=IGNORED)
    marks = samples.unwanted[:, 1:]
    chosen = logs[marks].gather(-1, samples.tokens[:, 1:][marks][:, None]).exp()
    # Where a document would end, every token that may not follow is one unwanted event.
    barred = logs[..., : correction.barred].exp().sum(-1)
    unlikely = torch.cat((chosen.flatten(), barred.flatten())).clamp(max=MAX_PROBABILITY)
    return followed - correction.unlikelihood * torch.log1p(-unlikely).sum() / marks.numel()


def corrected(
    correction: Correction,
    recipe: Recipe,
    weights: Weights,
    sources: tuple[Source, ...],
    prompts: PromptText,
    spelling: Spelling | None = None,
) -> Weights:
    """Return the trained weights after the corrections; without a spelling, only repetitions are unwanted."""
    shape, before = recipe.shape, weights
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in before.items()}
    moments, step = initial_moments(weights), 0
    # Without the conversations, the last source: their answers end after a sentence.
    text = nearest_text(torch.cat([source.tokens for source in sources[:-1] or sources]).long())
    judge = Judge(text, correction, spelling)
    ordinary = batches(sources, (correction.windows,) * correction.steps, recipe.seed + 1)
    for number, batch in enumerate(prompt_batches(prompts, correction, recipe.seed), start=1):
        written = greedy(shape, weights, batch, correction.sample_tokens, correction.barred)
        samples, losses = judge.judged(written, batch.shape[1]), []
        for some in samples.split(correction.rows):
            step += 1
            windows = next(ordinary)
            ordinary_loss = loss_and_gradients(shape, weights, windows[:, :-1], windows[:, 1:], len(windows))
            loss = correction_loss(shape, weights, some, correction)
            loss.backward()  # type: ignore[no-untyped-call]
            apply_gradients(weights, moments, recipe.rates.scaled(correction.rate_factor(step)), step)
            losses.append((ordinary_loss, loss.item()))
        _log_round(number, samples, losses)
    return {name: before[name].lerp(weight.detach(), correction.kept) for name, weight in weights.items()}


def _log_round(number: int, samples: Samples, losses: list[tuple[float, float]]) -> None:
    unwanted = samples.unwanted.float().mean().item()
    behind = samples.targets[:, :-1] != IGNORED
    agreed = (samples.targets[:, :-1] == samples.tokens[:, 1:])[behind].float().mean().item()
    ordinary, own = (sum(kind) / len(losses) for kind in zip(*losses, strict=True))
    message = "round %d: %.3f of the tokens are unwanted, %.3f follow the text, loss of text %.3f, of samples %.3f"
    log.info(message, number, unwanted, agreed, ordinary, own)
