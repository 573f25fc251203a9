"""Owns the decode role: reservations that a hand-off activates, and requests computed here from prompt to end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Literal

from decode_worker import admission, batching
from engine.protocol import (
    Cancel,
    ReserveBlocks,
    Reserved,
    ReserveRefused,
    SetPolicy,
    Submit,
    Work,
    WorkFailed,
    WriterDone,
)
from kv_transfer.receiver import ReceivedReport
from pdserve.errors import Cancelled, NoCapacity, PdserveError, TransferFailed, WorkerLost, error_from_reason
from pdserve.v1 import worker_pb2
from worker_runtime.dispatches import DispatchEvent, record_first_tokens
from worker_runtime.holding import RoleName
from worker_runtime.reports import HandoffFigures
from worker_runtime.roles import CommandHandler, RoleContext, live_sequences, take_work

# A controller sees the death of the other worker itself, and what died with it. Told of a broken hand-off first, it would send a
# prompt that may have killed that worker to the next one.
PEER_LOSS_TOLD_S = 0.5


class DecodeService:
    def __init__(self, context: RoleContext) -> None:
        self._context = context

    @property
    def role(self) -> RoleName:
        return "decode"

    def commands(self) -> Mapping[str, CommandHandler]:
        return {"reserve": self._reserve, "generate": self._generate}

    def policy(self) -> SetPolicy:
        return batching.policy(self._context.config.engine, self._context.engine.ready.layout.blocks)

    def _reserve(self, controller_id: str, request: worker_pb2.SessionRequest) -> None:
        context, message = self._context, request.reserve
        work = take_work(
            context.dispatches, controller_id, message.work, self._reserve_refusal, context.reports.refused
        )
        if work is not None:
            handler = ReservedDispatch(context, controller_id, work, message.transport)
            context.dispatches.admit(work, controller_id, handler)
            handler.start()

    def _generate(self, controller_id: str, request: worker_pb2.SessionRequest) -> None:
        context = self._context
        work = take_work(
            context.dispatches, controller_id, request.generate.work, self._generate_refusal, context.reports.refuse
        )
        if work is not None:
            context.dispatches.admit(work, controller_id, LocalDispatch(context, work))
            self._submit(work)

    def _submit(self, work: Work) -> None:
        """An engine that is gone never saw it: whoever looks for what the engine died of need not suspect it."""
        try:
            self._context.entrance.submit(Submit(work, "generate"))
        except WorkerLost:
            self._context.reports.failed(work.dispatch, self._context.holding.lose_engine())

    def _reserve_refusal(self, work: Work) -> PdserveError | None:
        context = self._context
        sequences = live_sequences(context.dispatches)
        return admission.reserve_refusal(work, context.holding, sequences, context.config.engine.max_running)

    def _generate_refusal(self, work: Work) -> PdserveError | None:
        context = self._context
        return admission.generate_refusal(work, context.holding, context.load.last, context.config.engine.token_budget)


class LocalDispatch:
    """A request that this worker computes from its prompt to its end."""

    def __init__(self, context: RoleContext, work: Work) -> None:
        self._context = context
        self._work = work

    def engine_event(self, event: DispatchEvent) -> None:
        if isinstance(event, WorkFailed):
            error = error_from_reason(event.reason, event.message)
            self._context.reports.failed(self._work.dispatch, error, event.choices)

    def tokens_ended(self, sequence: int) -> None:
        self._context.reports.settle(self._work.dispatch, sequence)

    def cancel(self) -> None:
        self._context.engine.send(Cancel(self._work.dispatch))


class ReservedDispatch:
    """A request whose KV comes from a prefill worker.

    reserving --Reserved--> granted --activated--> running --tokens_ended--> settled
        |                      |
        | refused, late        | writer ended, cancelled
        v                      v
      refused                failed, its blocks free once the writer is done
    """

    def __init__(self, context: RoleContext, controller_id: str, work: Work, transport: str) -> None:
        self._context = context
        self._controller_id = controller_id
        self._work = work
        self._transport = transport
        self._stage: Literal["reserving", "granted", "running"] = "reserving"
        self._answer_timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        lease_s = self._context.config.transfer.lease_s
        self._context.engine.send(ReserveBlocks(self._work, round(lease_s * 1000)))
        self._answer_timer = asyncio.get_running_loop().call_later(lease_s, self._unanswered)

    def engine_event(self, event: DispatchEvent) -> None:
        match event:
            case Reserved():
                self._reserved(event)
            case ReserveRefused():
                self._refused(error_from_reason(event.reason, event.message))
            case WorkFailed():
                self._work_failed(event)
            case _:
                pass  # Started tells the session; the rest belongs to the other role

    def tokens_ended(self, sequence: int) -> None:
        self._context.reports.settle(self._work.dispatch, sequence)

    def cancel(self) -> None:
        self._stop_timer()
        self._give_up(Cancelled("The request was cancelled."))

    def activated(self, first_tokens: tuple[tuple[int, int], ...], report: ReceivedReport) -> None:
        self._stage = "running"
        record = self._context.dispatches.get(self._work.dispatch)
        if record is None:
            return
        figures = HandoffFigures(
            transport=report.transport,
            size_bytes=report.bytes,
            segments=report.segments,
            transfer_us=report.transfer_us,
        )
        reports, dispatch = self._context.reports, self._work.dispatch
        sequence = reports.handoff(dispatch, worker_pb2.HANDOFF_STAGE_ACTIVATED, figures)
        record_first_tokens(record, first_tokens)
        if record.tokens_ended:
            reports.settle(dispatch, sequence)

    def writer_ended(self, error: PdserveError | None) -> None:
        self._context.engine.send(Cancel(self._work.dispatch))
        reports, dispatch = self._context.reports, self._work.dispatch
        if error is None:
            reports.settle(dispatch, 0)  # the prefill worker reported the end
        elif isinstance(error, TransferFailed):
            asyncio.get_running_loop().call_later(PEER_LOSS_TOLD_S, reports.failed, dispatch, error)
        else:
            reports.failed(dispatch, error)

    def _reserved(self, event: Reserved) -> None:
        self._stop_timer()
        try:
            grant = self._context.kv.grant(self._work, event, self._transport, self)
        except PdserveError as error:
            self._give_up(error)
            self._refused(error)
        else:
            self._stage = "granted"
            self._context.reports.granted(self._work.dispatch, grant)

    def _refused(self, error: PdserveError) -> None:
        self._stop_timer()
        self._context.reports.refused(self._controller_id, self._work.dispatch, error)

    def _unanswered(self) -> None:
        error = NoCapacity("The engine did not answer in time.")
        self._give_up(error)
        self._refused(error)

    def _work_failed(self, event: WorkFailed) -> None:
        error = error_from_reason(event.reason, event.message)
        self._context.reports.failed(self._work.dispatch, error, event.choices)
        if self._stage == "granted" and not event.choices:
            self._context.kv.revoke(self._work.dispatch, error)

    def _give_up(self, error: PdserveError) -> None:
        """Stops the request, and its writer where one was let in: the engine hears of the writer's end either way."""
        self._context.engine.send(Cancel(self._work.dispatch))
        match self._stage:
            case "reserving":
                self._context.engine.send(WriterDone(self._work.dispatch))
            case "granted":
                self._context.kv.revoke(self._work.dispatch, error)
            case "running":
                pass

    def _stop_timer(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None
