"""Owns what placement looks at: an immutable picture of the workers, and what one dispatch needs. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from controller.request import Route


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as the controller knows it now: its last report, corrected by what was sent to it since."""

    worker_id: str
    ready: bool
    draining: bool
    stalled: bool
    prefill: bool  # roles held
    decode: bool
    identity: bytes  # KV identity digest
    transports: tuple[str, ...]
    max_context_tokens: int
    block_tokens: int
    blocks_total: int
    blocks_free: int
    pending_prefill_tokens: int
    sequences: int
    max_batch: int
    token_budget: int


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    workers: tuple[WorkerView, ...]


@dataclass(frozen=True, slots=True)
class Demand:
    """What one dispatch needs. `tokens` are prompt and accepted output, `limit_tokens` the longest it can become."""

    tokens: int
    limit_tokens: int
    choices: int
    transport: str = ""  # empty = the best common one
    route: Route | None = None
    refused_now: frozenset[str] = frozenset()  # workers that refused it a moment ago
    bad_pairs: frozenset[tuple[str, str]] = frozenset()  # (prefill, decode) that could not hand over
