"""Tests of the training text: the corpus, the conversations and the tokenizer that is trained on them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from training.conversations import Message, conversations, facts, first_paragraph, render
from training.corpus import HELD_OUT_MODULES, Corpus, compiled_docstrings, read_corpus
from training.tokenizer import SPECIAL_TOKENS, train_tokenizer

pytestmark = pytest.mark.slow  # reads the standard library whole

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return read_corpus()


def test_the_corpus_is_the_same_in_another_process_with_another_hash_seed(corpus: Corpus) -> None:
    program = "from training.corpus import read_corpus; print(read_corpus().digest())"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    # -S: modules that site or a test runner loads must not change the text.
    command = [sys.executable, "-S", "-c", program]
    other = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert other.stdout.strip() == corpus.digest()


def test_the_corpus_holds_modules_tests_and_manual_pages(corpus: Corpus) -> None:
    names = {document.name for document in (*corpus.modules, *corpus.tests, *corpus.manual)}
    assert {"json/__init__.py", "test/test_queue.py", "topic:lists", "manual:itertools"} <= names


def test_no_document_is_both_trained_on_and_held_out(corpus: Corpus) -> None:
    trained = {document.name for document in (*corpus.modules, *corpus.tests, *corpus.manual)}
    held_out = {document.name for document in corpus.held_out}
    assert not trained & held_out
    assert {f"{name}.py" for name in HELD_OUT_MODULES} <= held_out


def test_a_module_that_a_library_lacks_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text('"""A queue."""\n')
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "decoder.py").write_text('"""A decoder."""\n')
    assert [d.name for d in read_corpus(tmp_path).modules] == ["json/decoder.py", "queue.py"]


def test_docstrings_of_compiled_modules_carry_public_names() -> None:
    assert "os.getpid" in dict(compiled_docstrings("posix"))
    assert "dict.update" in dict(compiled_docstrings("builtins"))


def test_the_conversations_are_the_same_for_the_same_seed_and_differ_for_another(corpus: Corpus) -> None:
    assert conversations(corpus, 7) == conversations(corpus, 7)
    assert conversations(corpus, 7) != conversations(corpus, 8)


def test_every_conversation_ends_with_an_answer(corpus: Corpus) -> None:
    for conversation in conversations(corpus, 7):
        assert [message.role for message in conversation[-2:]] == ["user", "assistant"]
        assert {message.role for message in conversation[:-2]} <= {"system", "user", "assistant"}


def test_a_function_of_a_module_becomes_a_fact_with_the_first_paragraph_of_its_docstring(corpus: Corpus) -> None:
    answers = {fact.name: fact.answer for fact in facts(corpus)}
    assert answers["json.dumps"] == "Serialize ``obj`` to a JSON formatted ``str``."
    assert answers["len"] == "Return the number of items in a container."


@pytest.mark.parametrize(
    ("docstring", "paragraph"),
    [
        ("Sort the list.\n\nIn place.", "Sort the list."),
        ("Return the\n    first item", "Return the first item."),
        ("f(x) -> int\n\nReturn a number.", "Return a number."),
        ("D.clear() -> None.  Remove all items from D.", "Remove all items from D."),
        (">>> f(1)\n2", ""),
        ("", ""),
    ],
)
def test_the_first_paragraph_is_prose_on_one_line(docstring: str, paragraph: str) -> None:
    assert first_paragraph(docstring) == paragraph


def test_a_conversation_renders_with_role_marks_and_end_marks() -> None:
    rendered = render((Message("user", "Hi"), Message("assistant", "Hello.")))
    assert rendered == "<|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n"


SMALL_TOKENIZER = train_tokenizer(["def read(path):\n    return path\n"] * 3, 300)


@settings(deadline=None)
@given(st.text())
def test_a_tokenizer_trained_on_a_few_lines_encodes_every_text(text: str) -> None:
    ids = SMALL_TOKENIZER.encode(text, add_special_tokens=False).ids
    assert SMALL_TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_the_special_tokens_are_the_first_ids() -> None:
    assert [SMALL_TOKENIZER.id_to_token(place) for place in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)


def test_digits_are_tokens_of_their_own() -> None:
    assert SMALL_TOKENIZER.encode("1234").tokens == ["1", "2", "3", "4"]


def test_training_the_tokenizer_twice_gives_the_same_tokenizer(corpus: Corpus) -> None:
    texts = [document.text for document in corpus.tests]

    def trained() -> Tokenizer:
        return train_tokenizer(texts, 400)

    assert trained().to_str() == trained().to_str()
