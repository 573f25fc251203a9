"""The command that rebuilds the model: `python -m training.tiny_model --out models/pdserve-tiny`."""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.blemishes import Spelling
from training.conversations import conversations, render
from training.corpus import Corpus, Document, read_corpus
from training.model_directory import rounded, write_model_directory
from training.network import Weights
from training.own_text import Correction, PromptText, corrected
from training.polishing import POLISHING, RECIPE, spelling, whole_lines
from training.settling import SETTLING
from training.tokenizer import END_OF_TEXT, token_id, train_tokenizer
from training.train import Recipe, held_out_loss, run
from training.windows import Source

log = logging.getLogger(__name__)

MODULE_SHARE, TEST_SHARE, MANUAL_SHARE, CHAT_SHARE = 0.55, 0.03, 0.29, 0.13
HELD_OUT_WINDOW = 512


@dataclass(frozen=True, slots=True)
class Prepared:
    """The tokenizer, the training sources, the tokens of prompts, the spelling and the held-out tokens of one corpus."""

    tokenizer: Tokenizer
    sources: tuple[Source, ...]
    prompts: Tensor
    spelling: Spelling
    held_out: Tensor


def prepare(corpus: Corpus, recipe: Recipe) -> Prepared:
    """Train the tokenizer on the corpus and turn every source into one stream of tokens."""
    chats = [render(conversation) for conversation in conversations(corpus, recipe.seed)]
    written = _texts((*corpus.modules, *corpus.tests, *corpus.manual))
    tokenizer = train_tokenizer([*written, *chats[::3]], recipe.shape.vocabulary)

    def source(texts: list[str], share: float) -> Source:
        return Source(stream(tokenizer, texts), share)

    sources = (
        source(_texts(corpus.modules), MODULE_SHARE),
        source(_texts(corpus.tests), TEST_SHARE),
        source(_texts(corpus.manual), MANUAL_SHARE),
        source(chats, CHAT_SHARE),
    )
    prompts, held_out = stream(tokenizer, _texts(corpus.prompts)), stream(tokenizer, _texts(corpus.held_out))
    known = spelling(tokenizer, (*written, *_texts(corpus.prompts)))
    return Prepared(tokenizer, sources, prompts, known, held_out)


def _texts(documents: tuple[Document, ...]) -> list[str]:
    return [document.text for document in documents]


def stream(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Return all texts as one int32 tensor of tokens, each text after an end-of-text token."""
    separator = token_id(tokenizer, END_OF_TEXT)
    tokens: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        tokens += [separator, *encoding.ids]
    return torch.tensor([*tokens, separator], dtype=torch.int32)


def trained(recipe: Recipe, prepared: Prepared, checkpoint: Path | None) -> Weights:
    """Run the four phases: learn the text by heart, settle, read own text twice; the first two resume."""
    learned = run(recipe, prepared.sources, checkpoint)
    beside = checkpoint and checkpoint.with_stem(f"{checkpoint.stem}-settling")
    settled = run(SETTLING, prepared.sources, beside, learned)
    anywhere = PromptText(prepared.prompts, range(len(prepared.prompts)))
    repeating_less = corrected(Correction(), SETTLING, settled, prepared.sources, anywhere)
    return polished(repeating_less, prepared)


def polished(weights: Weights, prepared: Prepared) -> Weights:
    """Run the fourth phase on the weights of the third."""
    lines = whole_lines(prepared.tokenizer, prepared.prompts)
    return corrected(POLISHING, RECIPE, weights, prepared.sources, lines, prepared.spelling)


def build(recipe: Recipe, out: Path, checkpoint: Path | None) -> None:
    """Train by the recipe and write the model directory; the log carries what the model card quotes."""
    corpus = read_corpus()
    prepared = prepare(corpus, recipe)
    log.info("corpus sha256 %s", corpus.digest())
    for name, source in zip(("modules", "tests", "manual", "chat"), prepared.sources, strict=True):
        log.info("%s: %d tokens, share %.2f", name, len(source.tokens), source.share)
    weights = trained(recipe, prepared, checkpoint)
    stored = rounded(weights)
    write_model_directory(out, recipe.shape, prepared.tokenizer, stored)
    for label, measured in (("float32", weights), ("stored bfloat16", {n: w.float() for n, w in stored.items()})):
        loss = held_out_loss(recipe.shape, measured, prepared.held_out, HELD_OUT_WINDOW)
        log.info("held-out loss, %s weights: %.4f nats per token", label, loss)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small model that ships with the repository, on CPU.")
    parser.add_argument("--out", type=Path, required=True, help="the model directory to write")
    parser.add_argument("--checkpoint", type=Path, help="a safetensors file to save to and to resume from")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (results differ in the last bits)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    build(Recipe(), arguments.out, arguments.checkpoint)


if __name__ == "__main__":
    main()
