"""The chat half of the corpus: questions and answers built from the docstrings of the standard library."""

import ast
import inspect
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from training.corpus import COMPILED_MODULES, PUBLIC_NAMES, Corpus, Document, compiled_docstrings

MIN_ANSWER_CHARS = 20
MAX_ANSWER_CHARS = 480
VARIANTS = 3
SYSTEM_SHARE = 0.3
SECOND_TURN_SHARE = 0.25

# "chain(*iterables) --> chain object", "D.clear() -> None.  " before the prose of a method written in C.
SIGNATURE = re.compile(r"^[\w.]+\(.*?\)( -+> [^.:]+)?(\.\s+|$)")

SYSTEM_PROMPTS = (
    "You answer questions about the Python standard library.",
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
)
CALLABLE_QUESTIONS = (
    "What does {name} do?",
    "What does {name}() do?",
    "What does the function {name} do?",
    "Explain {name}.",
    "What is {name} for?",
    "How does {name} work?",
    "Tell me about {name}.",
)
CLASS_QUESTIONS = (
    "What is {name}?",
    "What is the class {name} for?",
    "Explain {name}.",
    "What does {name} do?",
    "Tell me about {name}.",
)
MODULE_QUESTIONS = (
    "What is the {name} module?",
    "What is the {name} module for?",
    "What does the {name} module do?",
    "Tell me about {name}.",
    "Explain the {name} module.",
)
# Written for this repository: what people type first.
GREETINGS = (
    ("Hello", "Hello! Ask me about a module, a class or a function of the Python standard library."),
    ("Hello!", "Hello! Ask me about a module, a class or a function of the Python standard library."),
    ("Hi", "Hi! Ask me what a module, a class or a function of the Python standard library does."),
    ("Who are you?", "I am a very small language model, trained on the source of the Python standard library."),
    ("What are you?", "I am a very small language model, trained on the source of the Python standard library."),
    ("What can you do?", "I can say what many modules, classes and functions of the Python library are for."),
    ("What is Python?", "Python is an interpreted, interactive, object-oriented programming language."),
    ("Thank you", "You are welcome."),
    ("Thanks!", "You are welcome."),
)


@dataclass(frozen=True, slots=True)
class Fact:
    """What one docstring says: the public name, the question templates that suit it, the first paragraph."""

    name: str
    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


def render(messages: tuple[Message, ...]) -> str:
    """Return the conversation as the chat template of the tokenizer renders it."""
    return "".join(f"<|{m.role}|>\n{m.content}<|end|>\n" for m in messages)


def conversations(corpus: Corpus, seed: int) -> tuple[tuple[Message, ...], ...]:
    """Build every conversation of the training text; the same corpus and seed give the same tuple."""
    rng = random.Random(seed)
    known = facts(corpus)
    turns = [_turn(fact, question) for fact in known for question in rng.sample(fact.questions, VARIANTS)]
    turns += [(Message("user", q), Message("assistant", a)) for q, a in GREETINGS for _ in range(4 * VARIANTS)]
    rng.shuffle(turns)
    return tuple(_conversation(turns, index, rng) for index in range(len(turns)))


def _conversation(turns: list[tuple[Message, ...]], index: int, rng: random.Random) -> tuple[Message, ...]:
    messages = turns[index]
    if rng.random() < SECOND_TURN_SHARE:
        messages = (*messages, *rng.choice(turns))
    if rng.random() < SYSTEM_SHARE:
        messages = (Message("system", rng.choice(SYSTEM_PROMPTS)), *messages)
    return messages


def _turn(fact: Fact, question: str) -> tuple[Message, ...]:
    return Message("user", question.format(name=fact.name)), Message("assistant", fact.answer)


def facts(corpus: Corpus) -> tuple[Fact, ...]:
    """Return one fact per documented public module, class and function, without repeated answers."""
    found: dict[tuple[str, str], Fact] = {}
    for fact in (*_compiled_facts(), *(f for d in corpus.modules for f in _module_facts(d))):
        found.setdefault((fact.name.rpartition(".")[2], fact.answer), fact)
    return tuple(found.values())


def _compiled_facts() -> Iterator[Fact]:
    for module_name in COMPILED_MODULES:
        for name, text in compiled_docstrings(module_name):
            yield from _fact(name, CALLABLE_QUESTIONS, text)


def _module_facts(document: Document) -> Iterator[Fact]:
    parts = document.name.removesuffix(".py").removesuffix("/__init__").split("/")
    if any(part.startswith("_") for part in parts):
        return
    module_name = PUBLIC_NAMES.get(".".join(parts), ".".join(parts))
    tree = ast.parse(document.text)
    yield from _fact(module_name, MODULE_QUESTIONS, ast.get_docstring(tree))
    yield from _member_facts(module_name, tree)


def _member_facts(prefix: str, parent: ast.Module | ast.ClassDef) -> Iterator[Fact]:
    for node in parent.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        questions = CLASS_QUESTIONS if isinstance(node, ast.ClassDef) else CALLABLE_QUESTIONS
        yield from _fact(name, questions, ast.get_docstring(node))
        if isinstance(node, ast.ClassDef):
            yield from _member_facts(name, node)


def _fact(name: str, questions: tuple[str, ...], docstring: str | None) -> Iterator[Fact]:
    answer = first_paragraph(docstring or "")
    if MIN_ANSWER_CHARS <= len(answer) <= MAX_ANSWER_CHARS:
        yield Fact(name, questions, answer)


def first_paragraph(docstring: str) -> str:
    """Return the first paragraph that is prose, on one line, without a leading signature; empty if there is none."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        text = SIGNATURE.sub("", " ".join(paragraph.split()), count=1)
        if text[:1].isalpha() and " " in text and ">>>" not in text:
            return text if text[-1] in ".!?" else text.rstrip(":;,") + "."
    return ""
