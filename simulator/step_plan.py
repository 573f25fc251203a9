"""Owns the composition of one step: which sequences decode, which prompts get how many tokens. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.protocol import SetPolicy
from simulator.cost_model import CostModel
from simulator.dispatch_state import DispatchState, Sequence


@dataclass(frozen=True, slots=True)
class StepPlan:
    decodes: tuple[Sequence, ...]
    chunks: tuple[tuple[DispatchState, int], ...]  # (dispatch, tokens of its prompt)
    duration_s: float

    @property
    def streams_layers(self) -> bool:
        """Whether somebody waits for the KV of single layers."""
        return any(state.mode == "prefill" for state, _ in self.chunks)


def plan_step(
    sequences: Iterable[Sequence], prefilling: Iterable[DispatchState], policy: SetPolicy, cost: CostModel
) -> StepPlan | None:
    """Decodes first, then chunks of prompts in order of admission, under the token budget. None: nothing to do."""
    decodes = tuple(sequences)[: policy.max_running]
    budget = max(policy.token_budget - len(decodes), 1)
    chunks: list[tuple[DispatchState, int]] = []
    for state in prefilling:
        tokens = state.missing_tokens
        if policy.prefill_chunk:
            tokens = min(tokens, policy.prefill_chunk, budget)
        # An unchunked prompt may exceed the budget if it comes first: it could never run otherwise.
        if budget <= 0 or (chunks and tokens > budget):
            break
        chunks.append((state, tokens))
        budget -= tokens
    if not decodes and not chunks:
        return None
    context = sum(sequence.table.token_count + 1 for sequence in decodes)
    prompt_tokens = sum(tokens for _, tokens in chunks)
    return StepPlan(decodes, tuple(chunks), cost.step_s(prompt_tokens, len(decodes), context))
