"""CacheBlend and EPIC: time to the first token of a prompt of chunks whose KV is in memory, against a whole prefill.

`python -m benchmarks.blend [--full] [--threads N]`. The peer is our own engine's prefill of the same prompt, nothing reused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.command import add_threads, benchmark_parser, mode_of, publish
from benchmarks.engine_driver import EngineDriver
from benchmarks.random_model import DESCRIPTION, LLAMA_100M, write_random_llama
from benchmarks.report import Measurement, Mode, Result, compare, result
from benchmarks.shared_prefix import alternate
from engine.blend import BlendPass, BlendPrompt
from engine.blend_selection import Blend, Epic, Recipe
from engine.chunk_kv import ChunkIsolation, PlacedChunk
from engine.loaded_model import load_model
from engine.scattered_attention import open_scattered
from service_kit.config import EngineConfig, ModelConfig

CHUNK, QUESTION, PAGE = 256, 32, 16
LENGTHS = {"quick": (128, 512, 2048), "full": (64, 128, 256, 512, 1024, 2048, 4096, 8192)}
ROUNDS = {"quick": 3, "full": 3}
RATIOS = (0.05, 0.15, 0.2)
WHOLE = "whole prefill by our engine"


class Blender:
    """Blends prompts of one length: chunks of CHUNK tokens, computed alone beforehand, and a question behind them."""

    def __init__(self, model_dir: Path, threads: int, kv_bytes: int) -> None:
        settings = EngineConfig(threads=threads, kv_bytes=kv_bytes, block_tokens=PAGE)
        self._model, self._memory = load_model(
            ModelConfig(path=str(model_dir), device="cpu", dtype="float32"), settings
        )
        windows = self._model.spec.windows
        self._pass = BlendPass(self._model.decoder, open_scattered(self._memory.pool, self._model.kernels, windows))
        self._isolation = ChunkIsolation(self._model.decoder, self._model.kernels, self._memory.pool.dtype)

    def prompt(self, token_ids: Sequence[int]) -> BlendPrompt:
        end = len(token_ids) - QUESTION
        chunks = [
            PlacedChunk(start, self._isolation.isolate(token_ids[start : min(start + CHUNK, end)]))
            for start in range(0, end, CHUNK)
        ]
        return BlendPrompt(token_ids, np.arange(-(-len(token_ids) // PAGE), dtype=np.int32), chunks)

    @torch.inference_mode()
    def first_token(self, prompt: BlendPrompt, recipe: Recipe) -> int:
        blended = self._pass.run(prompt, recipe)
        return int(self._model.decoder.head(blended.hidden).argmax())

    def close(self) -> None:
        self._memory.close()


def recipes() -> dict[str, Recipe]:
    blends: dict[str, Recipe] = {f"blend, ratio {ratio:g}": Blend(ratio) for ratio in RATIOS}
    return {**blends, "first tokens, ratio 0.15": Epic(round(0.15 * CHUNK))}


def first_tokens(driver: EngineDriver, blender: Blender, tokens: int, rounds: int) -> list[Measurement]:
    """Milliseconds to the first token. The prefills of one length alternate with all blends of it."""
    source = torch.Generator().manual_seed(tokens)
    token_ids: list[int] = torch.randint(10, LLAMA_100M.vocab, (tokens,), generator=source).tolist()
    prompt, named = blender.prompt(token_ids), recipes()
    calls: list[Callable[[], object]] = [lambda: driver.prefill_s(token_ids)]
    calls += [partial(blender.first_token, prompt, recipe) for recipe in named.values()]
    whole, *blended = alternate(calls, rounds)
    return [
        compare(f"{name}, {tokens} tokens", "ms", samples, (WHOLE, whole), "lower")
        for name, samples in zip(named, blended, strict=True)
    ]


def run(mode: Mode, threads: int) -> Result:
    torch.set_num_threads(threads)
    kv_bytes = (max(LENGTHS[mode]) + 64) * LLAMA_100M.kv_elements_per_token * 4
    measured: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        model_dir = write_random_llama(Path(folder))
        driver = EngineDriver(model_dir, "cpu", "float32", threads=threads, kv_bytes=kv_bytes)
        blender = Blender(model_dir, threads, kv_bytes)
        for tokens in LENGTHS[mode]:
            measured += first_tokens(driver, blender, tokens, ROUNDS[mode])
        driver.close()
        blender.close()
    settings: dict[str, str | int | float | bool] = {
        "model": DESCRIPTION,
        "threads": threads,
        "dtype": "float32",
        "chunk_tokens": CHUNK,
        "question_tokens": QUESTION,
        "filtering": Blend(0.15).filtering,
    }
    notes = (
        "the chunks' KV lies in memory: nothing is loaded. A question behind the chunks is always computed",
        "a blend computes its last layer for the last token only; the engine's prefill computes it for all",
    )
    return result("blend", mode, settings, measured, notes=notes)


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Time to the first token with chunks reused, against a whole prefill.")
    add_threads(parser)
    given = parser.parse_args(arguments)
    publish(run(mode_of(given), given.threads))


if __name__ == "__main__":
    main()
