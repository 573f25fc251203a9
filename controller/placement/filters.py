"""Owns who may be a candidate: one constant name per reason for refusal, and its explanation. Pure.

A filter gives "" or the reason's name. The text is made by `explanation`, only for those who ask.
"""

from __future__ import annotations

from controller.placement.snapshot import Demand, WorkerView

# Another moment, the same worker: the dispatch waits in the queue.
CAPACITY = frozenset({"no_free_blocks", "batch_full", "queue_full", "refused_now", "suspect_there"})
# This worker will never take this request.
NEVER = frozenset({"context_limit", "pool_too_small"})

PREFERRED_TRANSPORTS = ("ucx", "tcp", "inproc")
QUEUED_STEPS_LIMIT = 4  # a worker's own queue is kept short, so that reserved blocks do not idle


def worker_refusal(view: WorkerView, demand: Demand) -> str:
    """What holds for every kind of work."""
    if not view.ready:
        return "draining" if view.draining else "not_ready"
    if view.draining:
        return "draining"
    if view.stalled:
        return "stalled"
    if demand.limit_tokens > view.max_context_tokens:
        return "context_limit"
    return "refused_now" if view.worker_id in demand.refused_now else ""


def prefill_refusal(view: WorkerView, demand: Demand) -> str:
    """Beyond `worker_refusal`, what speaks against computing the prompt here."""
    if demand.suspect and view.suspects:
        return "suspect_there"
    pending = view.pending_prefill_tokens
    if pending and pending >= QUEUED_STEPS_LIMIT * view.token_budget:
        return "queue_full"
    return "pool_too_small" if blocks_needed(view, demand) > view.blocks_total else ""


def decode_refusal(view: WorkerView, demand: Demand) -> str:
    """Beyond `worker_refusal`, what speaks against decoding here."""
    if view.sequences + demand.choices > view.max_batch:
        return "batch_full"
    blocks = blocks_needed(view, demand)
    if blocks > view.blocks_free:
        return "pool_too_small" if blocks > view.blocks_total else "no_free_blocks"
    return ""


def pair_refusal(prefill: WorkerView, decode: WorkerView, demand: Demand) -> str:
    if prefill.worker_id == decode.worker_id:
        return "same_worker"
    if prefill.identity != decode.identity:
        return "identity_mismatch"
    if not common_transport(prefill, decode, demand):
        return "no_common_transport"
    return "pair_failed_before" if (prefill.worker_id, decode.worker_id) in demand.bad_pairs else ""


def common_transport(prefill: WorkerView, decode: WorkerView, demand: Demand) -> str:
    """Empty where there is none."""
    if demand.transport:
        return (
            demand.transport if demand.transport in prefill.transports and demand.transport in decode.transports else ""
        )
    for transport in PREFERRED_TRANSPORTS:
        if transport in prefill.transports and transport in decode.transports:
            return transport
    return ""


def blocks_needed(view: WorkerView, demand: Demand) -> int:
    """For the KV of all tokens, and the next block of every choice."""
    return -(-demand.tokens // view.block_tokens) + demand.choices - 1


def explanation(reason: str, view: WorkerView, demand: Demand) -> str:
    match reason:
        case "":
            return ""
        case "not_ready":
            return "The worker has no open session."
        case "draining":
            return "The worker takes no new work: it drains."
        case "stalled":
            return "The worker's engine runs sequences but makes no step."
        case "role_not_held":
            return "The worker does not hold this role."
        case "context_limit":
            return (
                f"The request may become {demand.limit_tokens} tokens long, the context is {view.max_context_tokens}."
            )
        case "refused_now":
            return "The worker refused this dispatch a moment ago."
        case "suspect_there":
            return "A worker died with this prompt, and one with another that is computed there: they are kept apart."
        case "queue_full":
            return (
                f"{view.pending_prefill_tokens} prompt tokens wait there, over {QUEUED_STEPS_LIMIT} steps of "
                f"{view.token_budget}."
            )
        case "pool_too_small":
            return f"{blocks_needed(view, demand)} blocks are needed, the pool has {view.blocks_total}."
        case "no_free_blocks":
            return f"{blocks_needed(view, demand)} blocks are needed, {view.blocks_free} are free."
        case "batch_full":
            return f"{view.sequences} sequences run there, {demand.choices} more exceed {view.max_batch}."
        case _:
            return _PAIR_TEXTS[reason]


_PAIR_TEXTS = {
    "same_worker": "Prefill and decode on one worker is the local candidate.",
    "identity_mismatch": "The two workers' KV does not mean the same (model, weights, dtype or RoPE differ).",
    "no_common_transport": "The two workers share no KV transport.",
    "pair_failed_before": "This pair failed to hand over this request before.",
}
