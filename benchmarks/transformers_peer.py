"""Owns the peer of the engine benchmark: transformers' own model classes with SDPA and a DynamicCache, greedy, batched."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, LlamaForCausalLM


class TransformersPeer:
    """A DecodeContender and PrefillContender: the bare forward pass and an argmax."""

    name = f"transformers {transformers.__version__}"

    def __init__(self, model_dir: Path, dtype: torch.dtype, device: str = "cpu") -> None:
        self._device = device
        model: torch.nn.Module = LlamaForCausalLM.from_pretrained(
            model_dir, dtype=dtype, attn_implementation="sdpa", use_safetensors=True
        )
        self._model = model.to(torch.device(device)).eval()
        self._cache = DynamicCache()
        self._last = torch.empty(0, dtype=torch.long)

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Prefills all prompts at once. They have one length."""
        self._cache = DynamicCache()
        self._last = self._forward(torch.tensor(prompts, device=self._device))

    def steps_s(self, count: int) -> list[float]:
        return [self._step_s() for _ in range(count)]

    def end(self) -> None:
        self._cache = DynamicCache()

    def prefill_s(self, prompt: Sequence[int]) -> float:
        start_s = time.perf_counter()
        self.begin([prompt])
        elapsed_s = time.perf_counter() - start_s
        self.end()
        return elapsed_s

    def greedy_tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        self.begin([prompt])
        drawn = [int(self._last[0, 0])]
        for _ in range(count - 1):
            self._step_s()
            drawn.append(int(self._last[0, 0]))
        self.end()
        return drawn

    def _step_s(self) -> float:
        start_s = time.perf_counter()
        self._last = self._forward(self._last)
        return time.perf_counter() - start_s

    @torch.inference_mode()
    def _forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        output = self._model(input_ids=token_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        drawn: torch.Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
        drawn[0, 0].item()  # waits for an accelerator, as handing the token out would
        return drawn
