"""Tests of the chunk questions: each answer follows from two chunks and from no single one."""

import random
from collections import Counter
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from training.chunk_questions import (
    COLOURS,
    FACTS,
    FULL,
    ITEMS,
    RECORDS,
    WORDS,
    Layout,
    Question,
    draw_text,
    questions,
    words,
)

SMALL = Layout(chunks=3, chunk_tokens=12, people=5, records_per_chunk=4)
SEEDS = st.integers(0, 2**32)
LAYOUTS = st.builds(
    Layout,
    chunks=st.integers(2, 6),
    chunk_tokens=st.integers(16, 70),
    people=st.integers(1, 16),
    records_per_chunk=st.integers(1, 8),
)


def sayings(chunk: list[int], mark: str) -> dict[str, str]:
    """Left side -> right side of the compound words of a chunk."""
    return dict(word.split(mark) for word in words(chunk).split() if mark in word)


def solved(question: Question) -> str:
    """The answer as a reader of the words finds it."""
    first, *later = question.chunks
    holder = {item: person for chunk in later for item, person in sayings(chunk, ":").items()}
    asked = words(question.question).split()[-1]
    return sayings(first, "=")[holder[asked]]


@given(SEEDS, LAYOUTS)
def test_a_reader_of_all_chunks_finds_the_answer(seed: int, layout: Layout) -> None:
    for question in questions(seed, 2, layout):
        assert solved(question) == WORDS[question.answer]


@given(SEEDS, LAYOUTS)
def test_every_text_has_the_size_of_its_layout(seed: int, layout: Layout) -> None:
    (question,) = questions(seed, 1, layout)
    assert [len(chunk) for chunk in question.chunks] == [layout.chunk_tokens] * layout.chunks
    kinds = Counter(
        "fact" if word in FACTS else "record" if word in RECORDS else "filler"
        for chunk in question.chunks
        for word in words(chunk).split()
    )
    assert kinds["fact"] == layout.people
    assert kinds["record"] == (layout.chunks - 1) * layout.records_per_chunk


@given(SEEDS)
def test_facts_are_in_the_first_chunk_only_and_records_in_the_others(seed: int) -> None:
    (question,) = questions(seed, 1)
    first, *later = question.chunks
    assert not sayings(first, ":")
    assert not any(sayings(chunk, "=") for chunk in later)


@given(SEEDS)
def test_no_item_has_two_holders(seed: int) -> None:
    (question,) = questions(seed, 1)
    items = [item for chunk in question.chunks for item in sayings(chunk, ":")]
    assert len(items) == len(set(items)) == (FULL.chunks - 1) * FULL.records_per_chunk


@given(SEEDS, LAYOUTS)
def test_records_tell_where_they_are_and_what_follows_from_them(seed: int, layout: Layout) -> None:
    text = draw_text(random.Random(seed), layout)
    tokens = [token for chunk in text.chunks for token in chunk]
    colour_of = sayings(text.chunks[0], "=")
    for record in text.records:
        item, person = WORDS[tokens[record.place]].split(":")
        assert (item, colour_of[person]) == (WORDS[record.item], WORDS[record.colour])


def test_the_same_seed_gives_the_same_questions_and_another_seed_others() -> None:
    assert list(questions(5, 3)) == list(questions(5, 3))
    assert list(questions(5, 3)) != list(questions(6, 3))


def test_fewer_questions_are_the_first_of_more() -> None:
    assert list(questions(5, 3)) == list(islice(questions(5, 9), 3))


def test_an_item_alone_does_not_tell_the_colour() -> None:
    """Over many texts every colour answers about equally often, whichever item is asked for."""
    asked = list(questions(1, 6_000, SMALL))
    answers = Counter(WORDS[question.answer] for question in asked)
    assert answers.keys() == set(COLOURS)
    assert max(answers.values()) < 1.2 * len(asked) / len(COLOURS)
    pairs = Counter((words(question.question), question.answer) for question in asked)
    assert max(pairs.values()) < 4 * len(asked) / (len(ITEMS) * len(COLOURS))


def test_every_word_is_one_word_and_there_is_none_twice() -> None:
    assert len(set(WORDS)) == len(WORDS)
    assert all(len(word.split()) == 1 for word in WORDS)
