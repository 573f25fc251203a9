"""Owns the cost model of a modelled engine: how long a step takes. Pure.

Presets are fits to measured tables; all times in seconds:

- `h100-llama2-70b-tp4`, `h100-llama2-70b-tp8`, `a100-llama2-70b-tp8`: Mutinifni/splitwise-sim, data/perf_model.csv (MIT), medians
  per (prompt, batch, output) row. Prefill: least squares over the batch-1 rows with prompts of 128 to 2,048 tokens (largest
  error 18 ms). Decode: least squares of token_time over all rows with (1, batch, batch * mean context) (largest error 4 ms). The
  table varies the batch at prompt 512 / output 128 only, so the context term is weak evidence; its "pcap" rows are not used.
- `instant`: every step costs nothing. Steps then hardly ever hold more than one token, which no real engine does: for tests.
- `fast`: made up, a prompt in 1 ms and a decode step in 5 ms whatever its size: what is left is the cost of everything around the
  engine, while tokens still come in batches.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of a step: prefill = fixed + per token; decode = fixed + per sequence + per token of context.

    A mixed step reads the weights once, so it pays the larger of both fixed parts, not their sum.
    """

    prefill_fixed_s: float
    prefill_token_s: float
    decode_fixed_s: float
    decode_sequence_s: float
    decode_context_token_s: float
    speed: float = 1.0  # divides every time

    def step_s(self, prefill_tokens: int, decodes: int, context_tokens: int) -> float:
        """Duration of one step over `prefill_tokens` of prompts and `decodes` sequences with `context_tokens` in all."""
        fixed_s = max(
            self.prefill_fixed_s if prefill_tokens else 0.0,
            self.decode_fixed_s if decodes else 0.0,
        )
        variable_s = (
            self.prefill_token_s * prefill_tokens
            + self.decode_sequence_s * decodes
            + self.decode_context_token_s * context_tokens
        )
        return (fixed_s + variable_s) / self.speed

    def prefill_s(self, tokens: int, chunk_tokens: int = 0) -> float:
        """Duration of one prompt alone, in chunks of `chunk_tokens` (0 = in one step)."""
        chunk = chunk_tokens or max(tokens, 1)
        steps, rest = divmod(tokens, chunk)
        whole_s = steps * self.step_s(chunk, 0, 0)
        return whole_s + (self.step_s(rest, 0, 0) if rest else 0.0)


PRESETS: dict[str, CostModel] = {
    "instant": CostModel(0.0, 0.0, 0.0, 0.0, 0.0),
    "fast": CostModel(0.001, 0.0, 0.005, 0.0, 0.0),
    "h100-llama2-70b-tp4": CostModel(0.02085, 8.468e-5, 0.02871, 2.739e-4, 1.198e-7),
    "h100-llama2-70b-tp8": CostModel(0.03381, 4.693e-5, 0.02990, 2.064e-4, 1.737e-7),
    "a100-llama2-70b-tp8": CostModel(0.03717, 1.1413e-4, 0.04399, 2.003e-4, 3.486e-7),
}
