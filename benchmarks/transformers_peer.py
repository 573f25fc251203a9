"""Owns the peer of the engine benchmark: transformers' own model classes with SDPA and a DynamicCache, greedy, batched."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, LlamaForCausalLM

NAME = f"transformers {transformers.__version__}"


class TransformersPeer:
    def __init__(self, model_dir: Path, dtype: torch.dtype, device: str = "cpu") -> None:
        self._device = device
        model: torch.nn.Module = LlamaForCausalLM.from_pretrained(
            model_dir, dtype=dtype, attn_implementation="sdpa", use_safetensors=True
        )
        self._model = model.to(torch.device(device)).eval()
        self._cache = DynamicCache()
        self._last = torch.empty(0, dtype=torch.long)

    @torch.inference_mode()
    def prefill_s(self, prompts: Sequence[Sequence[int]]) -> float:
        """Seconds until the first tokens are drawn. All prompts have one length."""
        start_s = time.perf_counter()
        self._cache = DynamicCache()
        self._last = self._forward(torch.tensor(prompts, device=self._device))
        return time.perf_counter() - start_s

    @torch.inference_mode()
    def step_s(self) -> float:
        """Seconds of one decode step after `prefill_s`."""
        start_s = time.perf_counter()
        self._last = self._forward(self._last)
        return time.perf_counter() - start_s

    def _forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        output = self._model(input_ids=token_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        drawn: torch.Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
        drawn[0, 0].item()  # waits for an accelerator, as handing the token out would
        return drawn
