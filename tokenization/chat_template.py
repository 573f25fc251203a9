"""Owns the rendering of a checkpoint's chat template in a sandbox, with the globals and filters of Hugging Face's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.nodes
import jinja2.parser
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pdserve.errors import InvalidRequest, ModelUnsupported
from tokenization.model_files import NamedTemplate, read_special_tokens, read_tokenizer_config

MAX_PROMPT_CHARS = 32 * 2**20
Message = Mapping[str, object]


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; for serving it is plain text."""

    tags = {"generation"}  # noqa: RUF012 (the name and the type are jinja2's)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _source(model_dir: Path) -> str | None:
    own_file = model_dir / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    found = read_tokenizer_config(model_dir).chat_template
    if isinstance(found, list):
        return _default_of(found)
    return found


def _default_of(templates: Sequence[NamedTemplate]) -> str | None:
    return next((named.template for named in templates if named.name == "default"), None)


class ChatTemplate:
    """A compiled template. Thread-safe. A checkpoint without one refuses to render."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        self._source = source or ""
        try:
            self._template = _environment().from_string(source) if source is not None else None
        except jinja2.TemplateError as error:
            raise ModelUnsupported(f"The chat template does not compile: {error}. Check the checkpoint.") from error

    @classmethod
    def load(cls, model_dir: Path) -> ChatTemplate:
        return cls(_source(model_dir), read_special_tokens(model_dir))

    def mentions(self, word: str) -> bool:
        """Whether the template's source holds `word`, say the name of a role."""
        return word in self._source

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt's text. Raises InvalidRequest with the template's own words if it refuses the messages."""
        if self._template is None:
            raise InvalidRequest("This model has no chat template. Use /v1/completions.", param="messages")
        try:
            stream = self._template.generate(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None,
                **self._special_tokens,
            )  # fmt: skip
            return _join_bounded(stream.__next__)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            # The template's code runs on the client's messages: what it trips over is theirs.
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error


def _join_bounded(next_part: Callable[[], str]) -> str:
    parts: list[str] = []
    room = MAX_PROMPT_CHARS
    while True:
        try:
            part = next_part()
        except StopIteration:
            return "".join(parts)
        room -= len(part)
        if room < 0:
            raise InvalidRequest(f"The rendered chat is longer than {MAX_PROMPT_CHARS} characters.", param="messages")
        parts.append(part)
