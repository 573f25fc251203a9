"""Owns the choice of the peer that a worker may pull a prompt's KV from, and what that is worth to placement. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from controller.kv_prices import KvPrices
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
    return _first(puller, _ranked(workers, reuse), reuse)


def with_pulls(
    workers: Sequence[WorkerView], reuse: Mapping[str, Reuse], prices: Mapping[str, KvPrices]
) -> dict[str, Reuse]:
    """`reuse`, and what each worker would pull of the prompt, where it has measured that as faster than computing."""
    found, ranked = dict(reuse), _ranked(workers, reuse)
    for view in workers if ranked else ():
        price = prices[view.worker_id]
        source = _first(view, ranked, reuse) if price.peers else None
        share = price.of_peer(source.worker_id) if source is not None else 1.0
        if source is not None and share < 1.0:
            own = reuse.get(view.worker_id, NO_REUSE)
            pulled = source.tokens - own.held_tokens
            cost = own.load_cost_tokens + pulled * share
            found[view.worker_id] = replace(own, load_cost_tokens=cost, pulled_tokens=pulled, peer=source.worker_id)
    return found


def _ranked(workers: Iterable[WorkerView], reuse: Mapping[str, Reuse]) -> list[tuple[WorkerView, Reuse]]:
    """Those that hold something, in the order in which they are asked."""
    holders = [(view, reuse[view.worker_id]) for view in workers if view.worker_id in reuse]
    return sorted(
        holders,
        key=lambda each: (
            -each[1].held_tokens,
            -each[1].device_tokens,
            each[0].pending_prefill_tokens,
            each[0].worker_id,
        ),
    )


def _first(puller: WorkerView, ranked: Iterable[tuple[WorkerView, Reuse]], reuse: Mapping[str, Reuse]) -> Source | None:
    least = reuse.get(puller.worker_id, NO_REUSE).held_tokens + LEAST_GAIN_TOKENS
    worth_it = takewhile(lambda each: each[1].held_tokens >= least, ranked)
    return next((Source(view.worker_id, held.held_tokens) for view, held in worth_it if _lends(view, puller)), None)


def _lends(view: WorkerView, puller: WorkerView) -> bool:
    reachable = view.ready and not view.stalled and view.worker_id != puller.worker_id
    return reachable and view.identity == puller.identity and bool(set(view.transports) & set(puller.transports))
