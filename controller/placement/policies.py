"""Owns the scoring policies, registered by name: how loaded a candidate would be, in terms that add up. Less is better. Pure."""

from __future__ import annotations

from typing import Protocol

from controller.placement.snapshot import Demand, WorkerView
from pdserve.errors import ConfigInvalid

Terms = tuple[float, ...]

# A hand-off costs about this part of a prefill step, and a little per token; measured against transfers on one host.
HAND_OFF_STEPS = 0.02
HAND_OFF_STEPS_PER_TOKEN = 1e-5


class Policy(Protocol):
    """Names of the terms beside their values; the sum of a candidate's terms is its score."""

    prefill_names: tuple[str, ...]
    decode_names: tuple[str, ...]
    joint_names: tuple[str, ...]

    def prefill_terms(self, view: WorkerView, demand: Demand) -> Terms: ...

    def decode_terms(self, view: WorkerView, demand: Demand) -> Terms: ...

    def joint_terms(self, prefill: WorkerView, decode: WorkerView, demand: Demand) -> Terms: ...


class LeastLoaded:
    """Join the shortest queue (Splitwise, ISCA'24, section 4), in units of engine steps.

    Prefill side: steps of prompt work before this prompt, for what of it is computed, and steps that could be made while the rest is
    loaded, by speeds that the worker has measured. Decode side: share of the batch and of the KV pool in use.
    Jointly: a hand-off, or, on one worker, what the prompt's steps cost the sequences that decode there.
    """

    prefill_names: tuple[str, ...] = ("prefill_queue", "prefill", "load")
    decode_names: tuple[str, ...] = ("batch_fill", "kv_fill")
    joint_names: tuple[str, ...] = ("hand_off", "interference")

    def prefill_terms(self, view: WorkerView, demand: Demand) -> Terms:
        return (
            view.pending_prefill_tokens / view.token_budget,
            _computed(view, demand) / view.token_budget,
            demand.reuse_at(view).load_cost_tokens / view.token_budget,
        )

    def decode_terms(self, view: WorkerView, demand: Demand) -> Terms:
        return view.sequences / view.max_batch, 1.0 - view.blocks_free / view.blocks_total

    def joint_terms(self, prefill: WorkerView, decode: WorkerView, demand: Demand) -> Terms:
        if prefill is not decode:
            there = demand.reuse_at(decode).device_tokens if demand.reused == "prefix" else 0
            moved = demand.tokens - there
            return HAND_OFF_STEPS + moved * HAND_OFF_STEPS_PER_TOKEN, 0.0
        return 0.0, _computed(decode, demand) / decode.token_budget * min(decode.sequences, 8)


def _computed(view: WorkerView, demand: Demand) -> int:
    """Tokens that this worker would have to compute: the last one always, its logits are needed."""
    reuse = demand.reuse_at(view)
    return max(1, demand.tokens + demand.recomputed_tokens - reuse.held_tokens - reuse.pulled_tokens)


POLICIES: dict[str, Policy] = {"least-loaded": LeastLoaded()}


def policy_named(name: str) -> Policy:
    policy = POLICIES.get(name)
    if policy is None:
        raise ConfigInvalid(f"controller.placement: unknown policy {name!r}; known: {', '.join(sorted(POLICIES))}.")
    return policy
