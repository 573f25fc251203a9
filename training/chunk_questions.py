"""Owns the chunk questions: texts in chunks, and questions whose answer needs two of the chunks. Pure.

The first chunk of a text says which colour each person has ("anna=red"). The later chunks say which person holds which item
("item7:anna"). A question names an item and is answered by a colour: item -> person is in one chunk, person -> colour in
another one, and neither knows the other's content. Each saying is one word, hence one token; all else is filler. Colours
and persons are drawn independently for every text, so that no chunk and no habit answers better than one in eight.

A reader that computes each chunk's KV alone cannot know, in a later chunk, what the first one says; one that computes the
whole text can. How much of that is lost when KV of chunks is reused is what the questions measure.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"
ASK = "who"
COLOURS = ("red", "blue", "green", "black", "white", "brown", "pink", "grey")
PEOPLE = (
    *("anna", "boris", "clara", "david", "elena", "felix", "gita", "henry"),
    *("irene", "jonas", "kavya", "louis", "maria", "nadir", "olive", "pedro"),
)
ITEMS = tuple(f"item{number}" for number in range(48))
FILLERS = (
    *(
        "the",
        "a",
        "and",
        "then",
        "later",
        "there",
        "was",
        "were",
        "had",
        "been",
        "near",
        "under",
        "over",
        "with",
        "by",
        "to",
    ),
    *(
        "window",
        "door",
        "table",
        "garden",
        "street",
        "river",
        "rain",
        "light",
        "paper",
        "house",
        "tree",
        "road",
        "hill",
    ),
    *("boat", "stone", "cloud"),
)
FACTS = tuple(f"{person}={colour}" for person in PEOPLE for colour in COLOURS)
RECORDS = tuple(f"{item}:{person}" for item in ITEMS for person in PEOPLE)
WORDS = (END_OF_TEXT, UNKNOWN, ASK, *COLOURS, *PEOPLE, *ITEMS, *FILLERS, *FACTS, *RECORDS)
"""The vocabulary: a word's place is its token id."""

_ID = {word: place for place, word in enumerate(WORDS)}
_ASK_ID = _ID[ASK]
_COLOUR_IDS = [_ID[word] for word in COLOURS]
_ITEM_IDS = [_ID[word] for word in ITEMS]
_FILLER_IDS = [_ID[word] for word in FILLERS]
_FIRST_FACT_ID = _ID[FACTS[0]]
_FIRST_RECORD_ID = _ID[RECORDS[0]]


@dataclass(frozen=True, slots=True)
class Layout:
    """The size of a text. Items of one text differ, so `(chunks - 1) * records_per_chunk` is at most 48."""

    chunks: int = 6
    chunk_tokens: int = 64
    people: int = 16
    records_per_chunk: int = 8

    @property
    def text_tokens(self) -> int:
        return self.chunks * self.chunk_tokens


FULL = Layout()


class Question(NamedTuple):
    """A text's chunks and the question after them, as token ids; the token that answers it."""

    chunks: list[list[int]]
    question: list[int]
    answer: int


class Record(NamedTuple):
    """The token of an item, the place in the text of the word that gives it to a person, and that person's colour's token."""

    item: int
    place: int
    colour: int


@dataclass(frozen=True, slots=True)
class Text:
    """Chunks of equal length, and what can be asked about them."""

    chunks: list[list[int]]
    records: list[Record]


def questions(seed: int, count: int, layout: Layout = FULL) -> Iterator[Question]:
    """Yield `count` questions, each about a text of its own; the same arguments give the same questions."""
    rng = random.Random(seed)
    for _ in range(count):
        text = draw_text(rng, layout)
        record = rng.choice(text.records)
        yield Question(text.chunks, ask(record.item), record.colour)


def ask(item: int) -> list[int]:
    """Return the token ids that ask for an item's colour."""
    return [_ASK_ID, item]


def words(token_ids: list[int]) -> str:
    """Return token ids as the text that the tokenizer turns into them."""
    return " ".join(WORDS[token] for token in token_ids)


def draw_text(rng: random.Random, layout: Layout) -> Text:
    """Draw persons, their colours, items, their persons, and where among the filler each is said."""
    people = rng.sample(range(len(PEOPLE)), layout.people)
    colour_of = {person: rng.randrange(len(COLOURS)) for person in people}
    facts = [_FIRST_FACT_ID + person * len(COLOURS) + colour for person, colour in colour_of.items()]
    chunks = [_scattered(rng, facts, layout.chunk_tokens)[0]]
    records: list[Record] = []
    items = iter(rng.sample(range(len(ITEMS)), (layout.chunks - 1) * layout.records_per_chunk))
    for number in range(1, layout.chunks):
        holders = [(next(items), rng.choice(people)) for _ in range(layout.records_per_chunk)]
        sayings = [_FIRST_RECORD_ID + item * len(PEOPLE) + person for item, person in holders]
        chunk, places = _scattered(rng, sayings, layout.chunk_tokens)
        chunks.append(chunk)
        for (item, person), place in zip(holders, places, strict=True):
            place_in_text = number * layout.chunk_tokens + place
            records.append(Record(_ITEM_IDS[item], place_in_text, _COLOUR_IDS[colour_of[person]]))
    return Text(chunks, records)


def _scattered(rng: random.Random, sayings: list[int], length: int) -> tuple[list[int], list[int]]:
    """Return `length` tokens that hold the sayings, in their order, among filler, and the place of each."""
    places = sorted(rng.sample(range(length), len(sayings)))
    tokens = rng.choices(_FILLER_IDS, k=length)
    for place, saying in zip(places, sayings, strict=True):
        tokens[place] = saying
    return tokens, places
