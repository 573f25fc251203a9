"""Owns the reading test: `python -m training.reading_test models/pdserve-tiny` prints greedy text and its measures.

Ten prompts, five of documentation and five of code, cut from the held-out documents; none occurs in the training text.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from training.corpus import read_corpus
from training.network import Shape, Weights
from training.own_text import greedy
from training.readability import distinct_share, known_word_share, library_words, longest_loop
from training.tokenizer import END_OF_TEXT, END_OF_TURN, token_id

NEW_TOKENS = 200

PROMPTS = (
    "The difference between shallow and deep copying is only relevant for\n",
    "To parse a plist from a file, use the load(file) function,\n",
    "Yield expressions and statements are only used when defining a\n",
    "Options:\n  -n/--number N: how many times to execute",
    "A multi-line statement may be given by specifying each line as a\n",
    'def copy(x):\n    """',
    "class UID:\n    def __init__(self, data):\n",
    'def get_package(package):\n    # type: (Package) -> types.ModuleType\n    """',
    'def loads(s: str, /, *, parse_float: ParseFloat = float) -> dict[str, Any]:  # noqa: C901\n    """',
    "    def repeat(self, repeat=default_repeat, number=default_number):\n",
)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model wrote behind one prompt, up to an end token, and the measures of it."""

    prompt: str
    text: str
    tokens: int
    distinct: float
    loop_tokens: int
    known_words: float


def readings(directory: Path, prompts: tuple[str, ...], new_tokens: int) -> Iterator[Reading]:
    """Yield the greedy continuation of every prompt by the model of the recipe's shape in `directory`."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    weights = {name: weight.float() for name, weight in load_file(directory / "model.safetensors").items()}
    corpus = read_corpus()
    documents = (*corpus.modules, *corpus.manual, *corpus.prompts, *corpus.held_out)
    words = library_words(document.text for document in documents)
    for prompt in prompts:
        tokens = continuation(weights, tokenizer, prompt, new_tokens)
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        measures = distinct_share(tokens), longest_loop(tokens), known_word_share(text, words)
        yield Reading(prompt, text, len(tokens), *measures)


def continuation(weights: Weights, tokenizer: Tokenizer, prompt: str, new_tokens: int) -> list[int]:
    """Return the most likely tokens behind the prompt, up to an end token."""
    fed = tokenizer.encode(prompt).ids
    tokens = greedy(Shape(), weights, torch.tensor([fed]), new_tokens)[0, len(fed) :].tolist()
    ends = {token_id(tokenizer, END_OF_TEXT), token_id(tokenizer, END_OF_TURN)}
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Let a model write behind ten held-out prompts and measure the text.")
    parser.add_argument("directory", type=Path, help="the model directory")
    parser.add_argument("--tokens", type=int, default=NEW_TOKENS, help="greedy tokens per prompt")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    found = list(readings(arguments.directory, PROMPTS, arguments.tokens))
    for reading in found:
        print(f"{reading.prompt}⟶{reading.text}\n[{reading.tokens} tokens, distinct {reading.distinct:.2f}, ", end="")
        print(f"longest loop {reading.loop_tokens}, known words {reading.known_words:.2f}]\n{'-' * 72}")
    count = len(found)
    distinct, loop = sum(r.distinct for r in found) / count, sum(r.loop_tokens for r in found) / count
    known, tokens = sum(r.known_words for r in found) / count, sum(r.tokens for r in found) / count
    print(
        f"mean of {count}: {tokens:.0f} tokens, distinct {distinct:.3f}, longest loop {loop:.0f}, known words {known:.3f}"
    )
    print(f"looping (half of the text or more): {sum(2 * r.loop_tokens >= max(r.tokens, 1) for r in found)} of {count}")


if __name__ == "__main__":
    main()
