"""Owns what placement looks at: an immutable picture of the workers, and what one dispatch needs. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

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
    suspects: int = 0  # prompts it is to compute with which another worker died


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    workers: tuple[WorkerView, ...]


@dataclass(frozen=True, slots=True)
class Reuse:
    """Tokens of one prompt whose KV a worker holds: on the device, and beyond that in its tiers; and what it would pull beyond both,
    from `peer`. load_cost_tokens: loading and pulling those takes as long as computing so many there."""

    device_tokens: int = 0
    stored_tokens: int = 0
    load_cost_tokens: float = 0.0
    pulled_tokens: int = 0
    peer: str = ""

    @property
    def held_tokens(self) -> int:
        return self.device_tokens + self.stored_tokens


NO_REUSE = Reuse()
Reused = Literal["prefix", "chunks"]


@dataclass(frozen=True, slots=True)
class Demand:
    """What one dispatch needs. `tokens` are prompt and accepted output, `limit_tokens` the longest it can become.

    reused: what `reuse` counts. "chunks": their KV is blended, which a worker does for `recomputed_tokens` of them although it holds
    them; the result is sent whole.
    """

    tokens: int
    limit_tokens: int
    choices: int
    transport: str = ""  # empty = the best common one
    route: Route | None = None
    refused_now: frozenset[str] = frozenset()  # workers that refused it a moment ago
    bad_pairs: frozenset[tuple[str, str]] = frozenset()  # (prefill, decode) that could not hand over
    suspect: bool = False  # a worker died with its prompt: it is kept apart from others of that kind
    reuse: Mapping[str, Reuse] = field(default_factory=dict)  # by worker; those that hold nothing of it are left out
    reused: Reused = "prefix"
    recomputed_tokens: int = 0

    @property
    def one_token(self) -> bool:
        """It ends with the token that the prompt itself gives: nobody decodes on, so there is no KV to hand over."""
        return self.limit_tokens - self.tokens <= 1

    def reuse_at(self, view: WorkerView) -> Reuse:
        return self.reuse.get(view.worker_id, NO_REUSE)
