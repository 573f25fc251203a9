"""The native engine against transformers on the same weights, float32: greedy tokens equal, log-probabilities within 1e-4."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.attention_plan import Cut, Reader, TaskList, plan
from engine.protocol import StepTokens
from tests.engine.rig import (
    MIB,
    SHIPPED,
    Recorder,
    assert_all_free,
    families,
    generate,
    open_native,
    sampling,
    save_random,
    work,
)

LENGTHS = (1, 2, 15, 16, 17, 33, 100, 511, 512, 513, 2000)
NEW_TOKENS = 6
DOCUMENT_TOKENS = 1600  # whole blocks, more than two of the chunks of keys (768) by which attention is shared
MODELS = (*families(), "shipped")


@dataclass(frozen=True, slots=True)
class Checked:
    directory: Path
    reference: PreTrainedModel
    vocab: int


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checked]:
    found: dict[str, Checked] = {}
    for name, family in families().items():
        directory = tmp_path_factory.mktemp(name)
        found[name] = Checked(directory, save_random(family, directory), family.config.vocab_size)
    shipped = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    found["shipped"] = Checked(SHIPPED, shipped, shipped.config.vocab_size)
    return found


def prompts_of(checked: Checked, lengths: Sequence[int]) -> list[list[int]]:
    source = random.Random(11)
    return [[source.randrange(3, checked.vocab) for _ in range(length)] for length in lengths]


def assert_greedy(checked: Checked, prompt: Sequence[int], recorder: Recorder, key: int) -> None:
    """Every token is the reference's argmax after what came before it, every log-probability of the vocabulary its own."""
    drawn = recorder.tokens(key)[0]
    assert len(drawn) == NEW_TOKENS
    with torch.inference_mode():
        logits = checked.reference(torch.tensor([[*prompt, *drawn]])).logits[0, len(prompt) - 1 : -1]
    assert drawn == logits.argmax(-1).tolist()
    expected = logits.log_softmax(-1)
    rows = [
        step.logprobs[column]
        for step in recorder.of(StepTokens)
        for column, request_key in enumerate(step.request_keys)
        if request_key == key
    ]
    for position, row in enumerate(rows):
        assert row is not None
        ids, given = torch.tensor(row.token_ids[1:]), torch.tensor(row.logprobs[1:])
        assert len(ids) == 20
        torch.testing.assert_close(given, expected[position][ids], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"prefill_chunk": 512},
        {"prefill_chunk": 48, "block_tokens": 32},
        {"prefill_chunk": 0},
        {"prefill_chunk": 512, "kernels": "torch"},
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_a_mixed_batch_of_all_lengths(models: dict[str, Checked], name: str, settings: dict[str, int | str]) -> None:
    checked = models[name]
    engine, recorder = open_native(checked.directory, settings, kv_bytes=64 * MIB)
    prompts = prompts_of(checked, LENGTHS)
    generate(engine, *(work(key, prompt, sampling(NEW_TOKENS, logprobs=20)) for key, prompt in enumerate(prompts)))
    for key, prompt in enumerate(prompts):
        assert_greedy(checked, prompt, recorder, key)
    assert_all_free(engine)
    engine.close()


class Plans:
    """Plans as the engine does, and keeps how many prompts were read together at most."""

    def __init__(self) -> None:
        self.most_together: dict[int, int] = {}  # by window

    def __call__(self, readers: Sequence[Reader], cut: Cut) -> TaskList:
        tasks = plan(readers, cut)
        together = max(len(members) for members in tasks.members)
        self.most_together[cut.window] = max(together, self.most_together.get(cut.window, 0))
        return tasks


@pytest.mark.parametrize("chunk", [0, 200])
@pytest.mark.parametrize("name", MODELS)
def test_prompts_over_one_document_that_share_its_attention_and_reuse_its_blocks(
    models: dict[str, Checked], name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = Plans()
    monkeypatch.setattr("engine.kernel_attention.plan", plans)
    checked = models[name]
    document, *questions = prompts_of(checked, (DOCUMENT_TOKENS, 3, 16, 21, 40))
    prompts = [document + question for question in questions]
    settings = {"prefill_chunk": chunk, "token_budget": 4096, "shared_prefix_attention": True, "prefix_reuse": True}
    engine, recorder = open_native(checked.directory, settings, kv_bytes=64 * MIB)
    drawn = sampling(NEW_TOKENS, logprobs=20)
    generate(engine, work(0, prompts[0], drawn))
    assert engine.load().prefix_hits == 0
    generate(engine, *(work(key, prompt, drawn) for key, prompt in enumerate(prompts[1:], start=1)))
    assert engine.load().prefix_hits == (len(prompts) - 1) * DOCUMENT_TOKENS
    again = range(len(prompts), 2 * len(prompts))
    generate(engine, *(work(key, prompt, drawn) for key, prompt in zip(again, prompts, strict=True)))
    assert engine.load().prefix_hits >= (2 * len(prompts) - 1) * DOCUMENT_TOKENS
    for window, rows in plans.most_together.items():
        assert rows == (1 if window else len(prompts))  # nothing is shared in a window
    for key, prompt in enumerate([*prompts, *prompts]):
        assert_greedy(checked, prompt, recorder, key)
    assert_all_free(engine)
    engine.close()


@pytest.mark.parametrize("name", MODELS)
def test_one_prompt_at_a_time(models: dict[str, Checked], name: str) -> None:
    checked = models[name]
    engine, recorder = open_native(checked.directory)
    for key, prompt in enumerate(prompts_of(checked, (1, 16, 17, 700))):
        generate(engine, work(key, prompt, sampling(NEW_TOKENS, logprobs=20)))
        assert_greedy(checked, prompt, recorder, key)
    engine.close()


@pytest.mark.parametrize("name", ["llama", "llama-llama3", "mistral-linear", "qwen3-yarn"])
def test_both_forms_of_rope_in_a_config_mean_the_same(models: dict[str, Checked], name: str, tmp_path: Path) -> None:
    checked = models[name]
    config = json.loads((checked.directory / "config.json").read_text())
    section = config.pop("rope_parameters")
    theta, kind = section.pop("rope_theta"), section.pop("rope_type")
    config.update(rope_theta=theta, rope_scaling=None if kind == "default" else {"type": kind, **section})
    for file in checked.directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (prompt,) = prompts_of(checked, (300,))
    engine, recorder = open_native(tmp_path)
    generate(engine, work(0, prompt, sampling(NEW_TOKENS, logprobs=20)))
    assert_greedy(checked, prompt, recorder, 0)
    engine.close()


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama-llama3", "qwen3_moe-normalised"])
def test_bfloat16_stays_close_to_float32(models: dict[str, Checked], name: str) -> None:
    """Each drawn token is nearly as likely under the float32 reference as the best one."""
    checked = models[name]
    engine, recorder = open_native(checked.directory, dtype="bfloat16")
    prompts = prompts_of(checked, (5, 40, 300))
    generate(engine, *(work(key, prompt, sampling(NEW_TOKENS)) for key, prompt in enumerate(prompts)))
    for key, prompt in enumerate(prompts):
        drawn = recorder.tokens(key)[0]
        with torch.inference_mode():
            expected = (
                checked.reference(torch.tensor([[*prompt, *drawn]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            )
        regret = expected.max(-1).values - expected.gather(1, torch.tensor(drawn)[:, None])[:, 0]
        assert regret.max() < 0.3
    engine.close()
