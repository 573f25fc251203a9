"""Owns the native engine as a contender: whole engine steps (scheduling, block tables, sampling, events)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.engine_driver import Device, Dtype, EngineDriver, greedy
from service_kit.config import EngineConfig, ModelConfig

KV_BYTES = 2 * 2**30
PREFILL_CHUNK = 1024  # nothing decodes beside these prompts, and the peers take 2,048 and more at once
_LONGEST_OUTPUT = 4096  # tokens; longer than any case decodes


class OurEngine:
    """A DecodeContender and PrefillContender."""

    name = "pdserve"

    def __init__(self, model_dir: Path, dtype: Dtype, threads: int, device: Device = "cpu") -> None:
        self._driver = EngineDriver.configured(
            ModelConfig(path=str(model_dir), device=device, dtype=dtype),
            EngineConfig(threads=threads, kv_bytes=KV_BYTES, prefix_reuse=False, prefill_chunk=PREFILL_CHUNK),
        )
        self._keys: list[int] = []

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        self._keys = self._driver.begin_decode(prompts, _LONGEST_OUTPUT)

    def steps_s(self, count: int) -> list[float]:
        return [self._driver.step_s() for _ in range(count)]

    def end(self) -> None:
        self._driver.cancel(self._keys)
        self._keys = []

    def prefill_s(self, prompt: Sequence[int]) -> float:
        return self._driver.prefill_s(prompt)

    def greedy_tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        key = self._driver.submit(prompt, greedy(count))
        self._driver.finish()
        return self._driver.sink.token_ids[key]

    def close(self) -> None:
        self._driver.close()
