"""CacheBlend and EPIC: accuracy of the shipped model of chunk questions with chunks reused, against a whole prefill.

`python -m benchmarks.blend_accuracy [--full]`. Every recipe answers the same questions, none of which training drew.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from benchmarks.command import benchmark_parser, mode_of, publish
from benchmarks.report import Measurement, Mode, Result, compare, measure, result
from engine.blend import BlendPass, BlendPrompt
from engine.blend_selection import Blend, Epic, Recipe
from engine.chunk_kv import ChunkIsolation, PlacedChunk
from engine.loaded_model import load_model
from engine.scattered_attention import open_scattered
from service_kit.config import EngineConfig, ModelConfig
from training.chunk_questions import FULL, Question, questions

MODEL_DIR = Path(__file__).resolve().parents[1] / "models" / "pdserve-chunks"
QUESTIONS = {"quick": 100, "full": 1000}
CASE_S = {"quick": 60.0, "full": 900.0}  # fewer questions where the machine is slower
SEED = 987_654_321  # of questions that training never drew
RATIOS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
PAGE = 16
EXACT = "whole prefill"


@dataclass(slots=True)
class Score:
    right: int = 0
    divergence: float = 0.0  # Kullback-Leibler, of the whole prefill from this, in nats, summed


class Reader:
    """Answers questions with the logits of the last token."""

    def __init__(self, model_dir: Path) -> None:
        tokens = FULL.text_tokens + 2 * PAGE
        settings = EngineConfig(threads=1, kv_bytes=2**26, block_tokens=PAGE)
        self._model, self._memory = load_model(
            ModelConfig(path=str(model_dir), device="cpu", dtype="float32"), settings
        )
        windows = self._model.spec.windows
        self._pass = BlendPass(self._model.decoder, open_scattered(self._memory.pool, self._model.kernels, windows))
        self._isolation = ChunkIsolation(self._model.decoder, self._model.kernels, self._memory.pool.dtype)
        self._blocks = np.arange(tokens // PAGE, dtype=np.int32)

    def isolate(self, question: Question) -> list[PlacedChunk]:
        starts = accumulate((len(chunk) for chunk in question.chunks), initial=0)
        return [
            PlacedChunk(start, self._isolation.isolate(chunk))
            for start, chunk in zip(starts, question.chunks, strict=False)
        ]

    @torch.inference_mode()
    def log_probabilities(self, question: Question, chunks: Sequence[PlacedChunk], recipe: Recipe) -> torch.Tensor:
        """[vocab]. Without chunks a blend is a whole prefill, bit for bit (tests/engine/test_blend.py)."""
        token_ids = [token for chunk in question.chunks for token in chunk] + list(question.question)
        blended = self._pass.run(BlendPrompt(token_ids, self._blocks, chunks), recipe)
        return self._model.decoder.head(blended.hidden)[0].log_softmax(-1)

    def close(self) -> None:
        self._memory.close()


def recipes() -> dict[str, Recipe]:
    """By name; shares are of all the chunks' tokens, but the first chunk, which is exact, costs first tokens nothing."""
    found: dict[str, Recipe] = {"naive reuse": Epic(0)}
    for ratio in RATIOS:
        found[f"blend, ratio {ratio:g}"] = Blend(ratio)
        found[f"blend of one set, ratio {ratio:g}"] = Blend(ratio, filtering=0.0)
        if ratio:
            found[f"first tokens, ratio {ratio:g}"] = Epic(round(ratio * FULL.chunk_tokens))
    return found


def accuracies(mode: Mode) -> list[Measurement]:
    """Share of right answers, and the divergence from a whole prefill, of every recipe over the same questions."""
    reader, named = Reader(MODEL_DIR), recipes()
    scores = {name: Score() for name in (EXACT, *named)}
    asked, start_s = 0, time.monotonic()
    for question in questions(SEED, QUESTIONS[mode]):
        chunks = reader.isolate(question)
        exact = reader.log_probabilities(question, (), Blend(1.0))
        scores[EXACT].right += int(exact.argmax()) == question.answer
        for name, recipe in named.items():
            found = reader.log_probabilities(question, chunks, recipe)
            scores[name].right += int(found.argmax()) == question.answer
            scores[name].divergence += float((exact.exp() * (exact - found)).sum())
        asked += 1
        if time.monotonic() - start_s > CASE_S[mode]:
            break
    reader.close()
    whole = [100 * scores[EXACT].right / asked]
    measured = [measure("questions", "questions", [asked], "higher"), measure(f"right, {EXACT}", "%", whole, "higher")]
    for name in named:
        score = scores[name]
        measured.append(compare(f"right, {name}", "%", [100 * score.right / asked], (EXACT, whole), "higher"))
        measured.append(measure(f"divergence, {name}", "nats", [score.divergence / asked]))
    return measured


def run(mode: Mode) -> Result:
    torch.set_num_threads(1)
    settings: dict[str, str | int | float | bool] = {
        "model": "models/pdserve-chunks",
        "chunks": FULL.chunks,
        "chunk_tokens": FULL.chunk_tokens,
        "seed": SEED,
        "filtering": Blend(0.15).filtering,
        "dtype": "float32",
    }
    notes = (
        "one colour of eight is right by chance",
        "the ratio of first tokens counts those of every chunk, but the first chunk is exact and costs nothing",
        f"as many of {QUESTIONS[mode]} questions as {CASE_S[mode]:.0f} s allowed",
    )
    return result("blend_accuracy", mode, settings, accuracies(mode), notes=notes)


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Accuracy with chunks reused, against a whole prefill.")
    given = parser.parse_args(arguments)
    publish(run(mode_of(given)))


if __name__ == "__main__":
    main()
