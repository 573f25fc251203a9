"""Owns the timelines: what happened to the last N requests, stage by stage, and why they went where they went.

A timeline is written while its request lives and read by operators at any time; it holds no token and no text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from controller.blend_ratio import RatioChoice
from controller.operations import Attempt, Outcome, RequestState, RequestSummary, RequestTimeline, Stage, StageName
from controller.placement.explain import Placed
from controller.request import GenerationRequest

STAGES_KEPT = 256  # of one request; a request that is re-dispatched without end must not grow without end
PLACEMENTS_KEPT = 64
ATTEMPTS_KEPT = 128


@dataclass(slots=True)
class AttemptNotes:
    """One dispatch, as it goes."""

    attempt: int
    choices: tuple[int, ...]
    kind: str
    prefill_worker: str
    decode_worker: str
    transport: str
    resumed_tokens: int
    cached_tokens: int = 0
    outcome: Outcome = "running"
    reason: str = ""
    message: str = ""
    kv_bytes: int = 0
    segments: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    exposed_s: float = 0.0
    blended_tokens: int = 0

    def view(self) -> Attempt:
        return Attempt(
            self.attempt, self.choices, self.kind, self.prefill_worker, self.decode_worker, self.transport,
            self.resumed_tokens, self.cached_tokens, self.outcome, self.reason, self.message, self.kv_bytes,
            self.segments, self.queue_s, self.prefill_s, self.transfer_s, self.exposed_s,
            self.blended_tokens,
        )  # fmt: skip


@dataclass(slots=True)
class OpenStage:
    name: StageName
    attempt: int
    worker: str
    began_s: float  # monotonic
    ended_s: float | None = None


@dataclass(slots=True)
class Timeline:
    request_id: str
    prompt_tokens: int
    choices: int
    arrived_s: float  # monotonic
    arrived_unix_s: float
    state: RequestState = "QUEUED"
    finish_reasons: tuple[str, ...] = ()
    output_tokens: int = 0
    cached_tokens: int = 0
    blended_tokens: int = 0
    ratio_choice: RatioChoice | None = None
    first_token_s: float | None = None
    ended_s: float | None = None
    error: str = ""
    error_message: str = ""
    attempts: list[AttemptNotes] = field(default_factory=list)
    placements: list[Placed] = field(default_factory=list)
    stages: list[OpenStage] = field(default_factory=list)
    refresh: Callable[[], None] | None = None  # brings the figures of a live request up to date

    @classmethod
    def of(cls, request: GenerationRequest, now: float, unix_s: float) -> Timeline:
        return cls(request.request_id, request.prompt_tokens, request.n, now, unix_s)

    def begin(self, name: StageName, attempt: int, worker: str, now: float) -> OpenStage:
        stage = OpenStage(name, attempt, worker, now)
        if len(self.stages) < STAGES_KEPT:
            self.stages.append(stage)
        return stage

    def placed(self, placed: Placed) -> None:
        if len(self.placements) < PLACEMENTS_KEPT:
            self.placements.append(placed)

    def dispatched(self, notes: AttemptNotes) -> None:
        if len(self.attempts) < ATTEMPTS_KEPT:
            self.attempts.append(notes)

    def seconds(self, name: StageName) -> float:
        """Of all attempts together."""
        return sum((stage.ended_s or stage.began_s) - stage.began_s for stage in self.stages if stage.name == name)

    def summary(self, now: float) -> RequestSummary:
        if self.refresh is not None:
            self.refresh()
        last = self.attempts[-1] if self.attempts else AttemptNotes(0, (), "", "", "", "", 0)
        ended_s = self.ended_s if self.ended_s is not None else now
        return RequestSummary(
            request_id=self.request_id,
            state=self.state,
            arrived_unix_s=self.arrived_unix_s,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            choices=self.choices,
            attempts=len(self.attempts),
            ttft_s=None if self.first_token_s is None else self.first_token_s - self.arrived_s,
            total_s=ended_s - self.arrived_s,
            finish_reasons=self.finish_reasons,
            error=self.error,
            error_message=self.error_message,
            prefill_worker=last.prefill_worker,
            decode_worker=last.decode_worker,
            transport=last.transport,
        )

    def view(self, now: float) -> RequestTimeline:
        return RequestTimeline(
            request_id=self.request_id,
            summary=self.summary(now),
            cached_tokens=self.cached_tokens,
            stages=tuple(self._stage(stage) for stage in self.stages),
            attempts=tuple(notes.view() for notes in self.attempts),
            decisions=tuple(placed.decision() for placed in self.placements),
            blended_tokens=self.blended_tokens,
            ratio_choice=self.ratio_choice,
        )

    def _stage(self, stage: OpenStage) -> Stage:
        seconds = None if stage.ended_s is None else stage.ended_s - stage.began_s
        return Stage(stage.name, stage.attempt, stage.worker, stage.began_s - self.arrived_s, seconds)


class TimelineRing:
    """The last `kept` requests by id; a repeated id replaces the older request."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._timelines: OrderedDict[str, Timeline] = OrderedDict()

    def add(self, timeline: Timeline) -> None:
        self._timelines.pop(timeline.request_id, None)
        self._timelines[timeline.request_id] = timeline
        while len(self._timelines) > self._kept:
            self._timelines.popitem(last=False)

    def newest(self, limit: int) -> list[Timeline]:
        found: list[Timeline] = []
        for timeline in reversed(self._timelines.values()):
            if len(found) >= limit:
                break
            found.append(timeline)
        return found

    def get(self, request_id: str) -> Timeline | None:
        return self._timelines.get(request_id)
