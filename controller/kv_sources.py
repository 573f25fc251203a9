"""Owns the choice of the peer that a worker may pull a prompt's KV from. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from controller.placement.snapshot import NO_REUSE, Reuse, WorkerView

LEAST_GAIN_TOKENS = 64  # what a peer must hold more: less is computed before it could arrive


@dataclass(frozen=True, slots=True)
class Source:
    """A hint: the worker that computes decides by speeds that it has measured."""

    worker_id: str
    tokens: int  # of the prompt, from its first one on


def best_source(puller: WorkerView, workers: Iterable[WorkerView], reuse: Mapping[str, Reuse]) -> Source | None:
    """The worker that holds most of the prompt, if that is clearly more than `puller` holds; of equals the one with most of it on
    the device, then the one that has least to compute."""
    least = _held(reuse.get(puller.worker_id, NO_REUSE)) + LEAST_GAIN_TOKENS
    found = [
        (-_held(held), -held.device_tokens, view.pending_prefill_tokens, view.worker_id)
        for view in workers
        if _lends(view, puller) and _held(held := reuse.get(view.worker_id, NO_REUSE)) >= least
    ]
    if not found:
        return None
    held_tokens, _, _, worker_id = min(found)
    return Source(worker_id, -held_tokens)


def _held(reuse: Reuse) -> int:
    return reuse.device_tokens + reuse.stored_tokens


def _lends(view: WorkerView, puller: WorkerView) -> bool:
    reachable = view.ready and not view.stalled and view.worker_id != puller.worker_id
    return reachable and view.identity == puller.identity and bool(set(view.transports) & set(puller.transports))
