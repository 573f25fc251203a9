"""Tests of the model that ships with the repository: its files, its tokenizer, its template and what it writes."""

import json
import random
from pathlib import Path

import jinja2.sandbox
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from training.conversations import Message, render
from training.corpus import Corpus, read_corpus
from training.network import Shape, hidden_states, next_token_loss
from training.readability import distinct_share, known_word_share, library_words, printable_share, python_line_share
from training.reading_test import PROMPTS, readings
from training.tiny_model import stream
from training.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, END_OF_TURN, SPECIAL_TOKENS, token_id

pytestmark = pytest.mark.slow  # generates with the shipped model

DIRECTORY = Path(__file__).parents[2] / "models" / "pdserve-tiny"
FILES = (
    *("README.md", "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json"),
    *("tokenizer.json", "tokenizer_config.json"),
)
MAX_SIZE_BYTES = 16_000_000
NEW_TOKENS = 60

PROSE_PROMPTS = (
    "A generator function is",
    "When an exception is raised,",
    "The list of arguments is",
    "This method returns the",
    "If the file does not exist,",
)
CODE_PROMPTS = (
    'def read_config(path):\n    """',
    "class Stack:\n    def __init__(self",
    "    def close(self):\n",
    "for name in sorted(names):\n    ",
    "    try:\n        value = ",
)
QUESTIONS = ("What does json.dumps do?", "What is the textwrap module?", "What does len do?")

TOKENIZER = Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    loaded = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)
    assert isinstance(loaded, LlamaForCausalLM)
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(DIRECTORY)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return read_corpus()


@pytest.fixture(scope="module")
def words(corpus: Corpus) -> frozenset[str]:
    return library_words(document.text for document in (*corpus.modules, *corpus.manual))


def greedy(model: LlamaForCausalLM, prompt: str) -> list[int]:
    """Return the tokens that follow the prompt, up to an end token."""
    ends = {token_id(TOKENIZER, END_OF_TEXT), token_id(TOKENIZER, END_OF_TURN)}
    fed, cache = torch.tensor([TOKENIZER.encode(prompt).ids]), None
    written: list[int] = []
    with torch.inference_mode():
        while len(written) < NEW_TOKENS:
            output = model(fed, past_key_values=cache, use_cache=True)
            best, cache = int(output.logits[0, -1].argmax()), output.past_key_values
            if best in ends:
                break
            written.append(best)
            fed = torch.tensor([[best]])
    return written


def question(content: str) -> str:
    return render((Message("user", content),)) + "<|assistant|>\n"


def test_the_directory_is_complete() -> None:
    assert sorted(path.name for path in DIRECTORY.iterdir()) == sorted(FILES)


def test_the_directory_stays_under_sixteen_megabytes() -> None:
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) <= MAX_SIZE_BYTES


def test_the_configuration_is_the_one_of_the_recipe(model: LlamaForCausalLM) -> None:
    shape, config = Shape(), model.config
    assert config.model_type == "llama"
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (4096, shape.hidden, shape.layers)
    assert TOKENIZER.get_vocab_size() == config.vocab_size
    assert config.max_position_embeddings == shape.max_positions


def test_the_weights_are_stored_in_bfloat16() -> None:
    assert {weight.dtype for weight in load_file(DIRECTORY / "model.safetensors").values()} == {torch.bfloat16}


def test_generation_ends_at_the_end_of_text_and_at_the_end_of_a_turn() -> None:
    ends = [token_id(TOKENIZER, END_OF_TEXT), token_id(TOKENIZER, END_OF_TURN)]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((DIRECTORY / name).read_text())["eos_token_id"] == ends


def test_transformers_computes_the_logits_of_the_network_that_was_trained(model: LlamaForCausalLM) -> None:
    weights = {name: weight.float() for name, weight in load_file(DIRECTORY / "model.safetensors").items()}
    tokens = torch.tensor([TOKENIZER.encode("def area(self):\n    return self.width * self.height\n").ids])
    with torch.inference_mode():
        states = hidden_states(Shape(), weights, tokens)
        torch.testing.assert_close(
            states @ weights["model.embed_tokens.weight"].T, model(tokens).logits, atol=1e-3, rtol=1e-3
        )


@given(st.text())
def test_every_text_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@given(st.text(alphabet=" \t\r\n\u00a0ab(_1<|>end"))
def test_every_mix_of_spaces_and_marks_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_every_byte_has_a_token() -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    assert len(alphabet) == 256
    assert all(TOKENIZER.token_to_id(byte) is not None for byte in alphabet)


def test_special_tokens_are_single_tokens() -> None:
    assert [TOKENIZER.encode(token).ids for token in SPECIAL_TOKENS] == [[place] for place in range(5)]


messages = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), st.text()), max_size=4)


@given(messages, st.booleans())
def test_the_chat_template_renders_the_training_format(conversation: list[Message], asks: bool) -> None:
    template = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    records = [{"role": message.role, "content": message.content} for message in conversation]
    rendered = template.from_string(CHAT_TEMPLATE).render(messages=records, add_generation_prompt=asks)
    assert rendered == render(tuple(conversation)) + ("<|assistant|>\n" if asks else "")


def test_transformers_applies_the_same_template(tokenizer: PreTrainedTokenizerFast) -> None:
    records = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(records, tokenize=False, add_generation_prompt=True)
    assert rendered == render((Message("system", "Be brief."), Message("user", "Hi"))) + "<|assistant|>\n"


@pytest.fixture(scope="module")
def continuations(model: LlamaForCausalLM) -> dict[str, list[int]]:
    return {prompt: greedy(model, prompt) for prompt in (*PROSE_PROMPTS, *CODE_PROMPTS)}


@pytest.mark.parametrize("prompt", [*PROSE_PROMPTS, *CODE_PROMPTS])
def test_a_prompt_continues_readably(continuations: dict[str, list[int]], words: frozenset[str], prompt: str) -> None:
    tokens = continuations[prompt]
    text = TOKENIZER.decode(tokens)
    assert printable_share(text) == 1.0, text
    assert known_word_share(text, words) > 0.75, text
    assert distinct_share(tokens) > 0.15, text
    if prompt in CODE_PROMPTS:
        assert python_line_share(text) > 0.6, text


def test_over_all_prompts_words_are_known_and_loops_are_rare(
    continuations: dict[str, list[int]], words: frozenset[str]
) -> None:
    shares = [known_word_share(TOKENIZER.decode(tokens), words) for tokens in continuations.values()]
    variety = [distinct_share(tokens) for tokens in continuations.values()]
    assert sum(shares) / len(shares) > 0.9
    assert sum(variety) / len(variety) > 0.5


@pytest.mark.parametrize("content", QUESTIONS)
def test_a_question_is_answered_in_prose_that_ends(
    model: LlamaForCausalLM, words: frozenset[str], content: str
) -> None:
    tokens = greedy(model, question(content))
    text = TOKENIZER.decode(tokens)
    assert len(tokens) < NEW_TOKENS, text
    assert text.endswith("."), text
    assert known_word_share(text, words) > 0.7, text


def test_behind_every_held_out_prompt_come_two_hundred_readable_tokens_that_hardly_loop(corpus: Corpus) -> None:
    trained = [document.text for document in (*corpus.modules, *corpus.tests, *corpus.manual)]
    held_out = [document.text for document in corpus.held_out]
    for prompt in PROMPTS:
        assert any(prompt in text for text in held_out)
        assert not any(prompt in text for text in trained)
    found = list(readings(DIRECTORY, PROMPTS, 200))
    assert [reading.tokens for reading in found] == [200] * len(PROMPTS)
    assert sum(reading.known_words for reading in found) / len(found) > 0.97
    assert sum(reading.distinct for reading in found) / len(found) > 0.5
    assert max(reading.loop_tokens for reading in found) < 40


def test_random_letters_are_not_readable(words: frozenset[str]) -> None:
    letters = random.Random(3).choices("abcdefghijklmnopqrstuvwxyz     ", k=2_000)
    assert known_word_share("".join(letters), words) < 0.5


def test_random_tokens_are_not_readable(words: frozenset[str]) -> None:
    rng = random.Random(3)
    noise = TOKENIZER.decode([rng.randrange(len(SPECIAL_TOKENS), 4096) for _ in range(NEW_TOKENS)])
    assert known_word_share(noise, words) < 0.75
    assert printable_share(noise) < 1.0
    assert python_line_share(noise) < 0.6


def test_a_tight_loop_is_not_readable() -> None:
    assert distinct_share(TOKENIZER.encode("name: " * 30).ids) < 0.1


def test_prose_is_not_python() -> None:
    assert python_line_share("It's here.\nDon't stop?\nx = 1\n") == pytest.approx(1 / 3)


def test_text_two_thousand_tokens_into_a_context_is_predicted_as_well_as_earlier_text(
    corpus: Corpus, model: LlamaForCausalLM
) -> None:
    tokens = stream(TOKENIZER, [document.text for document in corpus.held_out])[: 4 * 2_400].long().view(4, 2_400)
    with torch.inference_mode():
        logits = model(tokens).logits[:, :-1].flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none").view(4, -1)
    assert losses[:, 1_900:].mean() < losses[:, 100:600].mean() + 0.3


def test_held_out_text_is_predicted_better_than_by_chance(corpus: Corpus) -> None:
    weights = {name: weight.float() for name, weight in load_file(DIRECTORY / "model.safetensors").items()}
    tokens = stream(TOKENIZER, [document.text for document in corpus.held_out])[: 8 * 257].long().view(8, 257)
    with torch.inference_mode():
        assert (
            next_token_loss(Shape(), weights, tokens).item() < 6.3
        )  # by chance: ln 4096 = 8.3; the model knows its text by heart, not others
