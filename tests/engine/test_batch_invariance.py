"""With the kernels a request's log-probabilities have the same bits whatever shares its batch and however its prompt is cut."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from engine.protocol import StepTokens, Submit
from tests.engine.rig import MIB, Recorder, families, generate, open_native, sampling, save_random, work

NEW_TOKENS = 5
ASKED = 0  # key of the request that is compared
MODELS = ("llama", "qwen3", "mistral-window", "qwen3_moe-normalised")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, directory in found.items():
        save_random(families()[name], directory)
    return found


def prompt(length: int, seed: int = 3) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 512) for _ in range(length)]


def bits(recorder: Recorder) -> list[tuple[int, tuple[int, ...], tuple[float, ...]]]:
    """Token, and the likeliest tokens with their log-probabilities, of every step of the request."""
    rows = []
    for step in recorder.of(StepTokens):
        for column, key in enumerate(step.request_keys):
            if key == ASKED:
                row = step.logprobs[column]
                assert row is not None
                rows.append((step.token_ids[column], tuple(row.token_ids), tuple(row.logprobs)))
    assert len(rows) == NEW_TOKENS
    return rows


def drawn(
    directory: Path, tokens: list[int], settings: Mapping[str, int | bool | str], *company: list[int], dtype: str
) -> object:
    engine, recorder = open_native(directory, settings, kv_bytes=64 * MIB, dtype=dtype)
    asked = work(ASKED, tokens, sampling(NEW_TOKENS, logprobs=20))
    generate(engine, asked, *(work(key, other, sampling(9)) for key, other in enumerate(company, start=1)))
    engine.close()
    return bits(recorder)


PRECISIONS = {
    "float32": ("float32", "auto"),
    "float8": ("float32", "float8_e4m3"),
    "bfloat16": ("bfloat16", "auto"),
}  # model, KV
CASES = [(name, "float32", length) for name in MODELS for length in (1, 17, 300, 1700)]
CASES += [("llama", "bfloat16", length) for length in (1, 17, 300)]
CASES += [(name, "bfloat16", 1700) for name in MODELS]
CASES += [(name, "float8", 1700) for name in ("llama", "mistral-window")]


@pytest.mark.parametrize(("name", "precision", "length"), CASES)
def test_company_and_chunks_change_no_bit(directories: dict[str, Path], name: str, precision: str, length: int) -> None:
    dtype, kv_dtype = PRECISIONS[precision]
    tokens, kv = prompt(length), {"kv_dtype": kv_dtype}
    whole: dict[str, int | str] = {"prefill_chunk": 0, "token_budget": 4096, **kv}
    cut: dict[str, int | str] = {"prefill_chunk": 512, "block_tokens": 32, "threads": 2, **kv}
    alone = drawn(directories[name], tokens, whole, dtype=dtype)
    others = [prompt(other, seed=other) for other in (1, 2, 5, 40, 333, 1200)]
    assert drawn(directories[name], tokens, whole, *others, dtype=dtype) == alone
    assert drawn(directories[name], tokens, {"prefill_chunk": 37, **kv}, *others, dtype=dtype) == alone
    assert drawn(directories[name], tokens, cut, *others, dtype=dtype) == alone


SHARED = [*((name, "float32") for name in MODELS), ("llama", "float8"), ("llama", "bfloat16"), ("qwen3", "bfloat16")]


@pytest.mark.parametrize(("name", "precision"), SHARED)
def test_a_prefix_that_others_share_changes_no_bit(directories: dict[str, Path], name: str, precision: str) -> None:
    dtype, kv_dtype = PRECISIONS[precision]
    document = prompt(1700)
    tokens = document + prompt(20, seed=4)
    others = [document + prompt(length, seed=length) for length in (5, 30, 31)]
    alone = drawn(directories[name], tokens, {"prefix_reuse": False, "kv_dtype": kv_dtype}, dtype=dtype)
    for share in (True, False):
        settings = {"shared_prefix_attention": share, "kv_dtype": kv_dtype}
        engine, recorder = open_native(directories[name], settings, kv_bytes=64 * MIB, dtype=dtype)
        generate(engine, work(99, document, sampling(1)))  # now in the pool
        for key, other in enumerate(others, start=1):
            engine.handle(Submit(work(key, other, sampling(30)), "generate"))
        for _ in range(10):
            engine.step()
        generate(engine, work(ASKED, tokens, sampling(NEW_TOKENS, logprobs=20)))
        assert engine.load().prefix_hits > 0
        engine.close()
        assert bits(recorder) == alone
