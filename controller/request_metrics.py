"""Owns when the controller's metrics are observed: at arrivals, first tokens, batches and ends, never by request id."""

from __future__ import annotations

from typing import Literal

from controller.live_request import LiveRequest
from controller.operations import StageName
from controller.worker_growth import WorkerGrowth
from controller.worker_record import WorkerRecord
from pdserve.errors import KvCorrupt, LayoutMismatch, LeaseExpired, PdserveError, TransferFailed
from pdserve.v1 import worker_pb2
from service_kit.metrics import FinishedReason, FleetLoad, Metrics, MigrationKind, RequestTimes, TransferFailure

_STAGES: tuple[StageName, ...] = ("queue", "reserve", "prefill", "transfer", "decode")
MICROSECONDS = 1e-6


class RequestObserver:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._growth = WorkerGrowth(metrics)

    def accepted(self, live: LiveRequest) -> None:
        self._metrics.requests.accepted(live.request.prompt_tokens)

    def rejected(self, error: PdserveError) -> None:
        self._metrics.requests.rejected(error.reason)

    def tokens(self, count: int, gaps_s: list[float]) -> None:
        self._metrics.requests.tokens(count)
        for gap_s in gaps_s:
            self._metrics.requests.token_gap(gap_s)

    def first_token(self, live: LiveRequest, now: float) -> None:
        self._metrics.requests.first_token(now - live.timeline.arrived_s)

    def decided(self, policy: str, reason: str) -> None:
        self._metrics.routing.decided(policy, reason)

    def blended(self, tokens: int) -> None:
        """Of one attempt: those of the next one are blended again."""
        self._metrics.fleet.blended(tokens)

    def migrated(self, kind: MigrationKind, outcome: Literal["resumed", "failed"]) -> None:
        self._metrics.routing.migrated(kind, outcome)

    def handed_over(self, report: worker_pb2.HandoffReport) -> None:
        self._metrics.transfer.handed_over(
            report.transport, report.bytes, report.transfer_us * MICROSECONDS, report.exposed_us * MICROSECONDS
        )

    def transfer_failed(self, error: TransferFailed | LayoutMismatch) -> None:
        self._metrics.transfer.failed(_transfer_failure(error))

    def ended(self, live: LiveRequest) -> None:
        timeline = live.timeline
        assert timeline.ended_s is not None
        if live.error is not None and timeline.first_token_s is None:
            self.rejected(live.error)
        first_s = timeline.first_token_s if timeline.first_token_s is not None else timeline.ended_s
        queue_s = timeline.seconds("queue")
        times = RequestTimes(
            queue_s=queue_s,
            prefill_s=max(0.0, first_s - timeline.arrived_s - queue_s),
            decode_s=timeline.ended_s - first_s,
            total_s=timeline.ended_s - timeline.arrived_s,
            output_tokens=max(len(output.token_ids) for output in live.outputs),
        )
        self._metrics.requests.finished(_finished_reason(live), times)
        for name in _STAGES:
            seconds = timeline.seconds(name)
            if seconds:
                self._metrics.requests.stage(name, seconds)

    def lag(self, seconds: float) -> None:
        self._metrics.event_loop_lag(seconds)

    def fleet(self, records: list[WorkerRecord], queued: int) -> None:
        """Sums over all workers that are there; called about once a second."""
        here = [record for record in records if record.member.state in ("READY", "DRAINING")]
        ready = [record.view() for record in here if record.member.takes_work]
        load = FleetLoad(
            running=sum(record.load.running for record in here),
            waiting=queued + sum(record.load.waiting for record in here),
            blocks_total=sum(record.load.blocks_total for record in here),
            blocks_free=sum(record.load.blocks_free for record in here),
            blocks_leaked=sum(record.load.blocks_leaked for record in here),
            ready_workers={
                "prefill": sum(view.prefill for view in ready),
                "decode": sum(view.decode for view in ready),
            },
        )
        self._metrics.fleet.load(load)
        self._growth.look(here)
        if ready:
            self._metrics.fleet.cache_config(ready[0].block_tokens, load.blocks_total)


def _transfer_failure(error: TransferFailed | LayoutMismatch) -> TransferFailure:
    if isinstance(error, LayoutMismatch):
        return "refused"
    if isinstance(error, LeaseExpired):
        return "timeout"
    return "checksum" if isinstance(error, KvCorrupt) else "connection"


def _finished_reason(live: LiveRequest) -> FinishedReason:
    if live.error is not None:
        return "error"
    return live.outputs[0].finish_reason or "cancelled"
