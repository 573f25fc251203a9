"""Owns how the tests drive an engine in their own process: works, a sink that keeps all events, whole runs."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from engine.native import NativeEngine
from engine.protocol import Command, Dispatch, Engine, Event, Sampling, StepTokens, Submit, Work
from kv_transfer.keys import chain_hashes
from service_kit.config import EngineConfig, ModelConfig

SHIPPED = Path(__file__).parents[2] / "models" / "pdserve-tiny"
MIB = 2**20
PROMPT = [(7 * position) % 500 + 5 for position in range(75)]
E = TypeVar("E")

SMALL: dict[str, object] = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# Small enough that prompts go past the original context, and that pairs of dimensions are in every band.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 8}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": [1]}


@dataclass(frozen=True, slots=True)
class Family:
    """A model class of transformers and its small config."""

    model: type[PreTrainedModel]
    config: PreTrainedConfig


def families() -> dict[str, Family]:
    """One per supported architecture, each with what is its own: biases, head norms, head dimensions, ties, scaled RoPE."""
    return {
        "llama": Family(
            LlamaForCausalLM,
            LlamaConfig.from_dict({**SMALL, "attention_bias": True, "mlp_bias": True, "rope_theta": 5e5}),
        ),
        "mistral": Family(
            MistralForCausalLM, MistralConfig.from_dict({**SMALL, "sliding_window": None, "head_dim": 32})
        ),
        "qwen2": Family(Qwen2ForCausalLM, Qwen2Config.from_dict({**SMALL, "tie_word_embeddings": True})),
        "qwen3": Family(
            Qwen3ForCausalLM, Qwen3Config.from_dict({**SMALL, "head_dim": 48, "tie_word_embeddings": False})
        ),
        "llama-llama3": Family(
            LlamaForCausalLM, LlamaConfig.from_dict({**SMALL, "tie_word_embeddings": True, "rope_parameters": LLAMA3})
        ),
        "mistral-linear": Family(
            MistralForCausalLM,
            MistralConfig.from_dict(
                {**SMALL, "sliding_window": None, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}
            ),
        ),
        "qwen3-yarn": Family(
            Qwen3ForCausalLM, Qwen3Config.from_dict({**SMALL, "head_dim": 24, "rope_parameters": YARN})
        ),
        "mistral-window": Family(
            MistralForCausalLM, MistralConfig.from_dict({**SMALL, "sliding_window": 200, "head_dim": 32})
        ),
        "qwen2-window": Family(
            Qwen2ForCausalLM,
            Qwen2Config.from_dict({**SMALL, "use_sliding_window": True, "sliding_window": 33, "max_window_layers": 1}),
        ),
        "qwen3_moe": Family(Qwen3MoeForCausalLM, Qwen3MoeConfig.from_dict({**SMALL, **EXPERTS, "head_dim": 24})),
        "qwen3_moe-normalised": Family(
            Qwen3MoeForCausalLM, Qwen3MoeConfig.from_dict({**SMALL, **EXPERTS, "norm_topk_prob": True})
        ),
    }


def save_random(family: Family, directory: Path) -> PreTrainedModel:
    """Weights large enough that logits differ clearly between tokens; biases and norms are random too."""
    torch.manual_seed(7)
    model = family.model(family.config)
    model.train(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.08 + ("norm" in name))
    model.save_pretrained(directory)
    return model


@dataclass(slots=True)
class Recorder:
    """An EventSink that keeps everything."""

    events: list[Event] = field(default_factory=list)
    flushed: list[int] = field(default_factory=list)  # how many events there were at each flush

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def flush(self) -> None:
        self.flushed.append(len(self.events))

    def of(self, kind: type[E], key: int | None = None) -> list[E]:
        """Events of a kind, of one request where `key` is given."""
        found: list[E] = [event for event in self.events if isinstance(event, kind)]
        if key is None:
            return found
        return [event for event in found if getattr(event, "dispatch", Dispatch(-1, -1)).request_key == key]

    def tokens(self, key: int, attempt: int = 1) -> dict[int, list[int]]:
        """Token ids per choice; fails where an output index is missing or comes twice."""
        out: dict[int, list[tuple[int, int]]] = {}
        for step in self.of(StepTokens):
            for column, request_key in enumerate(step.request_keys):
                if request_key == key and step.attempts[column] == attempt:
                    out.setdefault(step.choices[column], []).append((step.indices[column], step.token_ids[column]))
        for rows in out.values():
            first = rows[0][0]
            assert [index for index, _ in rows] == list(range(first, first + len(rows)))
        return {choice: [token for _, token in rows] for choice, rows in out.items()}

    def finishes(self, key: int) -> dict[int, int]:
        """Finish reason per choice that ended."""
        return {
            step.choices[column]: step.finish[column]
            for step in self.of(StepTokens)
            for column, request_key in enumerate(step.request_keys)
            if request_key == key and step.finish[column]
        }


def sampling(
    max_tokens: int = 8,
    *,
    temperature: float = 0.0,
    seed: int = 1,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    ignore_eos: bool = True,
    stop_token_ids: tuple[int, ...] = (),
    min_tokens: int = 0,
) -> Sampling:
    return Sampling(
        temperature, 1.0, 0, 0.0, 1.0, 0.0, 0.0, {}, seed, max_tokens, min_tokens, ignore_eos, stop_token_ids, logprobs,
        prompt_logprobs,
    )  # fmt: skip


def work(
    key: int,
    prompt: Sequence[int],
    drawn: Sampling | None = None,
    *,
    output: Sequence[int] = (),
    attempt: int = 1,
    choices: tuple[int, ...] = (0,),
    priority: int = 0,
) -> Work:
    """`output`: accepted in earlier attempts."""
    token_ids = array("i", [*prompt, *output]).tobytes()
    hashes = chain_hashes(bytes(32), token_ids)
    dispatch = Dispatch(key, attempt)
    return Work(dispatch, f"r{key}", choices, token_ids, len(prompt), drawn or sampling(), hashes, priority)


def open_native(
    model_dir: Path,
    settings: Mapping[str, int | bool | str] | None = None,
    *,
    kv_bytes: int = 16 * MIB,
    dtype: str = "float32",
) -> tuple[NativeEngine, Recorder]:
    recorder = Recorder()
    model = ModelConfig.model_validate({"path": str(model_dir), "device": "cpu", "dtype": dtype})
    engine = EngineConfig.model_validate({"kv_bytes": kv_bytes, "threads": 1, **(settings or {})})
    return NativeEngine.open(model, engine, recorder), recorder


def finish(engine: Engine, *commands: Command, steps: int = 20_000) -> None:
    """Hands over `commands`, then steps until nothing is left to do."""
    for command in commands:
        engine.handle(command)
    for _ in range(steps):
        if not engine.step():
            return
    raise AssertionError(f"still busy after {steps} steps")


def generate(engine: Engine, *works: Work) -> None:
    finish(engine, *(Submit(one, "generate") for one in works))


def assert_all_free(engine: Engine) -> None:
    load = engine.load()
    assert (load.blocks_free, load.blocks_leaked, load.running, load.waiting) == (load.blocks_total, 0, 0, 0)
