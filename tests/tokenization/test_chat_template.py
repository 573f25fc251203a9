from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from pdserve.errors import InvalidRequest, ModelUnsupported
from tests.tokenization.fixtures import byte_level_backend, write_model_dir
from tokenization.chat_template import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [{"role": "system", "content": "Be <brief> & 'kind'."}, {"role": "user", "content": "Hällo 你"}]

# Shapes seen in published checkpoints: whitespace control, namespace, filters, loop controls, tojson, generation.
PUBLISHED_SHAPES = [
    "{{ bos_token }}{% for m in messages %}\n  {%- if m.role == 'system' %}[{{ m['content'] | trim }}]\n"
    "  {% else %}{{ m.content }}{{ eos_token }}{% endif %}\n{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if loop.last %}{% break %}{% endif %}"
    "{{ m | tojson }}{% endfor %}{{ ns.n }}",
    "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
    "{%- if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% endif %}"
    "{{ rest | map(attribute='content') | join(',') }}"
    "{% if not tools %}none{% endif %}{% if tools is none %}!{% endif %}",
    "{% macro show(m) %}<{{ m.content | upper }}>{% endmacro %}{{ show(messages[1]) }}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
]


@pytest.mark.parametrize("source", PUBLISHED_SHAPES)
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(source: str, prompt: bool) -> None:
    reference = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=byte_level_backend(), chat_template=source, **SPECIAL
    )
    expected = reference.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
    assert ChatTemplate(source, SPECIAL).render(CHAT, add_generation_prompt=prompt) == expected


def test_loads_the_template_of_a_checkpoint(tmp_path: Path) -> None:
    folder = write_model_dir(tmp_path, byte_level_backend())
    assert ChatTemplate.load(folder).render(CHAT[1:]) == "<|user|>Hällo 你<|end|>>"
    (folder / "chat_template.jinja").write_text("{{ eos_token }}{{ bos_token }}")
    assert ChatTemplate.load(folder).render(CHAT) == "<|end|><|user|>"


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.load(tmp_path).render(CHAT) == "D"


def test_a_checkpoint_without_template_says_what_to_use(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        ChatTemplate.load(tmp_path).render(CHAT)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content.x }}",
        "{{ 1 + messages[0].content }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 1 // 0 }}",
    ],
)
def test_what_a_template_refuses_or_trips_over_is_the_clients_error(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(source, SPECIAL).render(CHAT)
    assert caught.value.param == "messages"


def test_the_output_is_bounded() -> None:
    source = "{% for i in range(100000) %}{% for j in range(100000) %}{{ messages[0].content }}{% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequest, match="longer than"):
        ChatTemplate(source, SPECIAL).render([{"role": "user", "content": "x" * 100_000}])


def test_the_clock_can_be_asked() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", SPECIAL).render(CHAT).startswith("2")


def test_a_template_that_does_not_compile_is_refused_at_load() -> None:
    with pytest.raises(ModelUnsupported, match="compile"):
        ChatTemplate("{% if %}", SPECIAL)
