"""Owns what operators see and do: the state of the cluster, timelines of requests, role changes and drains. Pure.

Field names are those of the operator API's JSON (`GET /api/v1/status`, `/api/v1/requests`): the HTTP layer writes these
dataclasses as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from controller.blend_gate import BlendGate, BlendStatus
from controller.blend_ratio import RatioChoice
from controller.kv_operations import KvOperations
from controller.placement.decision import Decision
from tokenization.chat_template import ChatTemplate
from tokenization.tokenizer import Tokenizer

RoleName = Literal["prefill", "decode"]
WorkerState = Literal["JOINING", "READY", "DRAINING", "GONE"]
RequestState = Literal["QUEUED", "PREFILLING", "TRANSFERRING", "DECODING", "FINISHED", "FAILED", "CANCELLED"]
StageName = Literal["queue", "reserve", "prefill", "transfer", "decode"]
Outcome = Literal["running", "finished", "refused", "lost", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The one model served. Made once, in `__main__`; tokenizer and template are thread-safe."""

    name: str
    created_unix_s: int
    max_context_tokens: int
    tokenizer: Tokenizer
    chat_template: ChatTemplate


@dataclass(frozen=True, slots=True)
class KvEndpointStatus:
    transport: str
    address: str


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    id: str
    roles: tuple[RoleName, ...]
    state: WorkerState
    pid: int
    engine_pid: int
    address: str
    version: str
    incarnation: str  # decimal: too large for a JavaScript number
    kv_endpoints: tuple[KvEndpointStatus, ...]
    blocks_total: int
    blocks_free: int  # free or evictable
    blocks_leaked: int
    reserved_blocks: int
    running: int
    waiting: int
    waiting_tokens: int
    dispatches: int  # that this controller has there now
    step_ms: float
    engine_step: int
    stalled: bool  # the engine runs sequences but makes no step
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    verify_failures: int
    expired_leases: int
    resident_bytes: int
    silent_s: float  # since its last message
    lost_reason: str  # where state is GONE
    pinned_bytes: int = 0  # of the KV arena, registered with the CUDA driver


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    api_url: str
    grpc_address: str
    controller_id: str
    pid: int
    model: str
    version: str
    uptime_s: float
    draining: bool
    queued: int  # requests without a worker
    live_requests: int
    workers: tuple[WorkerStatus, ...]
    kv_blend: BlendStatus

    def ready(self) -> bool:
        """True if a request could be served now."""
        return not self.draining and any(worker.state == "READY" for worker in self.workers)


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of one attempt. `seconds` is None while it lasts."""

    name: StageName
    attempt: int
    worker: str
    begins_s: float  # after the arrival of the request
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Attempt:
    attempt: int
    choices: tuple[int, ...]
    kind: str  # of the picked candidate
    prefill_worker: str
    decode_worker: str
    transport: str
    resumed_tokens: int  # output tokens that earlier attempts had brought
    cached_tokens: int
    outcome: Outcome
    reason: str  # of the error, where there was one
    message: str
    kv_bytes: int
    segments: int
    queue_s: float  # inside the prefill worker
    prefill_s: float  # computing, as the prefill worker measured it
    transfer_s: float  # first byte to last
    exposed_s: float  # end of prefill to activation
    blended_tokens: int = 0  # of chunks whose KV was blended: approximate


@dataclass(frozen=True, slots=True)
class RequestSummary:
    request_id: str
    state: RequestState
    arrived_unix_s: float
    prompt_tokens: int
    output_tokens: int
    choices: int
    attempts: int
    ttft_s: float | None
    total_s: float  # so far, where the request lives
    finish_reasons: tuple[str, ...]  # per choice; empty text while it runs
    error: str  # reason, where the request failed
    error_message: str
    prefill_worker: str  # of the last attempt
    decode_worker: str
    transport: str


@dataclass(frozen=True, slots=True)
class RequestTimeline:
    """`pdserve explain` and `pdserve trace`: everything kept of one request."""

    request_id: str
    summary: RequestSummary
    cached_tokens: int
    stages: tuple[Stage, ...]
    attempts: tuple[Attempt, ...]
    decisions: tuple[Decision, ...]
    blended_tokens: int = 0  # of the first attempt
    ratio_choice: RatioChoice | None = None  # where the request left it to measured speeds


class Operations(Protocol):
    """What the operator API needs of the controller. Implemented by `controller.operator_desk.OperatorDesk`."""

    @property
    def kv(self) -> KvOperations: ...

    @property
    def blends(self) -> BlendGate: ...

    def status(self) -> ClusterStatus: ...

    def requests(self, limit: int) -> tuple[RequestSummary, ...]:
        """Newest first, live ones included."""

    def request(self, request_id: str) -> RequestTimeline | None:
        """None where it never was or is no longer kept."""

    async def set_roles(self, worker_id: str, roles: tuple[RoleName, ...]) -> WorkerStatus:
        """Returns the worker once it holds `roles`. Raises NotFound, InvalidRequest, Unavailable, DeadlineExceeded."""

    async def drain(self, worker_id: str) -> WorkerStatus:
        """Returns once the worker takes no new work; it ends when its running requests have. Raises like `set_roles`."""
