"""Owns what operators see and do of the KV tiers: figures, pages, where a prompt lies, pins, flushes, checks. Pure.

Field names are those of the operator API's JSON (`/api/v1/kv`): the HTTP layer writes these dataclasses as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

PAGES_LISTED = 100
PAGES_LISTED_MOST = 10_000
KEYS_MOST = 10_000
HOLD_MOST_S = 7 * 86_400.0
VERIFY_S = 5.0
VERIFY_MOST_S = 8.0
VERIFY_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Prompt:
    """token_ids: int32 little-endian."""

    token_ids: bytes
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which pages, where. An empty field selects everything; `keys` and `prompt` add up."""

    worker_id: str = ""
    tier: str = ""
    keys: tuple[bytes, ...] = ()
    prompt: Prompt | None = None


@dataclass(frozen=True, slots=True)
class VerifyBounds:
    """max_bytes: in each tier of each worker. after: only pages with higher keys."""

    deadline_s: float = VERIFY_S
    max_bytes: int = VERIFY_BYTES
    after: bytes = b""


@dataclass(frozen=True, slots=True)
class TierStatus:
    """One tier of one worker. Counters are since the worker's start."""

    tier: str
    capacity_bytes: int  # 0 = without bound of ours
    used_bytes: int
    pages: int | None  # None where nobody counts them
    hit_tokens: int
    miss_tokens: int
    bytes_in: int
    bytes_out: int
    read_s: float
    read_pages: int
    write_s: float
    stored: int  # pages, like those that follow
    evicted: int
    evicted_age_s: float  # summed over evicted pages
    expired: int
    dropped: int
    failures: int  # calls that the medium failed
    verify_failures: Mapping[str, int]  # by kind


@dataclass(frozen=True, slots=True)
class LoadsStatus:
    """Prompts that looked into a worker's tiers."""

    queried_tokens: int
    loaded_tokens: Mapping[str, int]  # by tier
    late: int
    no_room: int
    not_worth_it: int
    offers_skipped: int
    dropped_on_the_way_down: int
    load_s: float


@dataclass(frozen=True, slots=True)
class WorkerTiers:
    worker: str
    block_tokens: int
    device_tokens: int  # that the pool has room for
    device_free_tokens: int  # free or evictable
    device_query_tokens: int
    device_hit_tokens: int
    held_tokens: Mapping[str, int]  # by tier, as the worker's KV events tell
    tiers: tuple[TierStatus, ...]
    loads: LoadsStatus


@dataclass(frozen=True, slots=True)
class KvStat:
    workers: tuple[WorkerTiers, ...]


@dataclass(frozen=True, slots=True)
class Silence:
    """A worker that did not answer, or whose tier could not be looked at (reason "tier_failed")."""

    worker: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class PageStatus:
    """key, parent: hex. parent: empty at the start of a chain, and where it is not known."""

    worker: str
    tier: str
    key: str
    parent: str
    size_bytes: int
    age_s: float
    refs: int
    held_s: float


@dataclass(frozen=True, slots=True)
class KvPages:
    pages: tuple[PageStatus, ...]
    silent: tuple[Silence, ...]


@dataclass(frozen=True, slots=True)
class WorkerHolding:
    """tokens: of the prompt, by tier. reusable_tokens: from its start without a gap, in whatever tiers of this worker."""

    worker: str
    tokens: Mapping[str, int]
    reusable_tokens: int


@dataclass(frozen=True, slots=True)
class KvExplanation:
    """keyed_tokens: in whole hash units: no others are ever kept."""

    prompt_tokens: int
    keyed_tokens: int
    workers: tuple[WorkerHolding, ...]
    silent: tuple[Silence, ...]


@dataclass(frozen=True, slots=True)
class OutcomeStatus:
    """What was done in one tier of one worker. pages: pinned, dropped, or found good. bad: found bad, and dropped."""

    worker: str
    tier: str
    pages: int
    bad: int
    checked_bytes: int
    cut: bool  # there is more to do
    last_key: str  # hex; of a check that was cut
    bad_keys: tuple[str, ...]  # hex, the first 100
    failure: str  # why the tier did not do it


@dataclass(frozen=True, slots=True)
class KvOutcome:
    outcomes: tuple[OutcomeStatus, ...]
    silent: tuple[Silence, ...]


class KvSight(Protocol):
    """Looking changes nothing. Implemented by `controller.kv_desk.KvDesk`."""

    def stat(self) -> KvStat: ...

    async def pages(self, selection: Selection, limit: int) -> KvPages:
        """At most `limit` of each tier of each worker, the newest first. Raises NotFound, InvalidRequest, Unavailable,
        DeadlineExceeded; where several workers are asked, one that does not answer is told in the result instead."""

    async def explain(self, prompt: Prompt) -> KvExplanation:
        """Where a prompt's KV lies. Raises Unavailable while no worker is ready."""


class KvSteering(Protocol):
    """All raise like `KvSight.pages`."""

    async def pin(self, selection: Selection, hold_s: float) -> KvOutcome:
        """Keeps pages from eviction and expiry for so long; 0 lets go of them."""

    async def flush(self, selection: Selection) -> KvOutcome:
        """Drops pages; without keys and prompt all of the tier, or of all tiers and the device pool."""

    async def verify(self, selection: Selection, bounds: VerifyBounds) -> KvOutcome:
        """Compares pages with what was stored, and drops the bad ones."""


class KvOperations(KvSight, KvSteering, Protocol):
    """What the operator APIs need of the controller for the KV tiers."""
