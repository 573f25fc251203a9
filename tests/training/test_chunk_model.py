"""Tests of the model of the chunk questions: its training, its files, and that the engine answers with it."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.native import NativeEngine
from tests.engine.rig import Recorder, generate, open_native, sampling, work
from tokenization.tokenizer import Tokenizer, ids_from_bytes
from training.chunk_model import CURRICULUM, IGNORED, Recipe, Stage, batches, chunk_tokenizer, fresh_weights, train
from training.chunk_questions import FULL, WORDS, Layout, Question, questions, words
from training.network import Shape
from training.optimizer import LearningRates

DIRECTORY = Path(__file__).parents[2] / "models" / "pdserve-chunks"
FILES = (
    *("README.md", "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json"),
    *("tokenizer.json", "tokenizer_config.json"),
)
ASKED = 200
SHAPE = Shape(vocabulary=1024, hidden=32, intermediate=64, layers=2, heads=2, kv_heads=1, head_dim=16, max_positions=64)
TINY = Layout(chunks=2, chunk_tokens=6, people=2, records_per_chunk=2)
RECIPE = Recipe(
    shape=SHAPE,
    matching_layers=(0,),
    rates=LearningRates(0.02, 1e-2),
    stages=(Stage(TINY, rows=8, asks=8, steps=80),),
    warmup_steps=5,
)


@pytest.fixture(scope="module")
def engine() -> Iterator[tuple[NativeEngine, Recorder]]:
    opened, recorder = open_native(DIRECTORY)
    yield opened, recorder
    opened.close()


def prompt_of(question: Question) -> list[int]:
    return [token for chunk in question.chunks for token in chunk] + question.question


def test_the_shipped_weights_answer_fresh_questions_after_a_full_prefill(
    engine: tuple[NativeEngine, Recorder],
) -> None:
    native, recorder = engine
    asked = list(questions(20_261_121, ASKED))
    works = [work(key, prompt_of(question), sampling(max_tokens=1)) for key, question in enumerate(asked)]
    for one in works:  # one at a time: 200 together would not fit the small pool
        generate(native, one)
    right = sum(recorder.tokens(key)[0] == [question.answer] for key, question in enumerate(asked))
    assert right >= 0.95 * ASKED


def test_the_answer_needs_the_first_chunk(engine: tuple[NativeEngine, Recorder]) -> None:
    """With the first chunk of another text the same records answer no better than guesses."""
    native, recorder = engine
    asked = list(questions(20_261_122, ASKED))
    for key, question in enumerate(asked):
        swapped = question._replace(chunks=[asked[key - 1].chunks[0], *question.chunks[1:]])
        generate(native, work(1_000 + key, prompt_of(swapped), sampling(max_tokens=1)))
    right = sum(recorder.tokens(1_000 + key)[0] == [question.answer] for key, question in enumerate(asked))
    assert right <= 0.25 * ASKED


def test_the_directory_is_complete() -> None:
    assert sorted(path.name for path in DIRECTORY.iterdir()) == sorted(FILES)


def test_the_shipped_weights_have_the_shape_of_the_recipe() -> None:
    expected = {name: tuple(weight.shape) for name, weight in fresh_weights(Recipe()).items()}
    assert {name: tuple(w.shape) for name, w in load_file(DIRECTORY / "model.safetensors").items()} == expected


def test_the_shipped_tokenizer_turns_the_words_of_a_text_into_its_tokens() -> None:
    tokenizer = Tokenizer.load(DIRECTORY)
    for question in questions(3, 5):
        encoded = tokenizer.encode(words(prompt_of(question)), add_special_tokens=False)
        assert ids_from_bytes(encoded) == prompt_of(question)


def test_the_shipped_tokenizer_is_the_one_of_the_script() -> None:
    assert (DIRECTORY / "tokenizer.json").read_text(encoding="utf-8") == chunk_tokenizer().to_str(pretty=True)


def test_an_unknown_word_is_one_token_and_no_other_word() -> None:
    encoded = chunk_tokenizer().encode("who item99").ids
    assert [WORDS[token] for token in encoded] == ["who", "<|unknown|>"]


def test_a_few_steps_lower_the_loss() -> None:
    losses = [loss for _, loss in train(RECIPE, fresh_weights(RECIPE))]
    assert len(losses) == 80
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_two_runs_of_one_recipe_give_the_same_weights() -> None:
    runs = []
    for _ in range(2):
        weights = fresh_weights(RECIPE)
        list(islice(train(RECIPE, weights), 3))
        runs.append(weights)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_labels_are_the_colours_at_the_records_and_at_the_asked_items() -> None:
    (batch,) = islice(batches(replace(RECIPE, stages=(Stage(TINY, rows=1, asks=3, steps=1),))), 1)
    tokens = [WORDS[token] for token in batch.tokens[0].tolist()]
    read = (batch.readings[0] != IGNORED).nonzero().flatten().tolist()
    assert read == [place for place, word in enumerate(tokens) if ":" in word]
    asked = (batch.answers[0] != IGNORED).nonzero().flatten().tolist()
    assert asked == [place + 1 for place, word in enumerate(tokens) if word == "who"]
    assert [WORDS[label] for label in batch.answers[0, asked].tolist()] == [tokens[place + 1] for place in asked]


def test_the_curriculum_ends_with_the_texts_that_are_asked_about() -> None:
    assert CURRICULUM[-1].layout == FULL
    lengths = [stage.layout.text_tokens for stage in CURRICULUM]
    assert lengths == sorted(lengths)
