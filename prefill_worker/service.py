"""Owns the prefill role: a Prefill command becomes a prompt in the engine and a hand-off to the decode worker."""

from __future__ import annotations

from collections.abc import Mapping

from engine.protocol import Cancel, KvReady, PrefillDone, ReleaseSource, SetPolicy, Started, Submit, Work, WorkFailed
from kv_transfer.sender import HandoffOutcome
from pdserve.errors import Cancelled, InvalidRequest, PdserveError, error_from_reason
from pdserve.v1 import worker_pb2
from prefill_worker import admission, batching
from worker_runtime.dispatches import DispatchEvent
from worker_runtime.holding import RoleName
from worker_runtime.messages import MAX_NAME_CHARS, dispatch_from_proto
from worker_runtime.reports import HandoffFigures
from worker_runtime.roles import CommandHandler, RoleContext, take_work


class PrefillService:
    def __init__(self, context: RoleContext) -> None:
        self._context = context

    @property
    def role(self) -> RoleName:
        return "prefill"

    def commands(self) -> Mapping[str, CommandHandler]:
        return {"prefill": self._prefill}

    def policy(self) -> SetPolicy:
        return batching.policy(self._context.config.engine)

    def _prefill(self, controller_id: str, request: worker_pb2.SessionRequest) -> None:
        context, message = self._context, request.prefill
        work = take_work(context.dispatches, controller_id, message.work, self._refusal, context.reports.refuse)
        if work is None:
            return
        if dispatch_from_proto(message.grant.dispatch) != work.dispatch:
            raise InvalidRequest("The grant is not for the dispatch of the work.", param="grant")
        if not 0 < len(message.decode_address) <= MAX_NAME_CHARS:
            raise InvalidRequest("Prefill needs the address of the decode worker.", param="decode_address")
        handler = PrefillDispatch(context, work, message)
        context.dispatches.admit(work, controller_id, handler)
        handler.start()

    def _refusal(self, work: Work) -> PdserveError | None:
        context = self._context
        return admission.refusal(work, context.holding, context.load.last, context.config.engine.token_budget)


class PrefillDispatch:
    """One prompt: computed here, its KV pushed as it appears.

        Submit --Started, KvReady..., PrefillDone--> Commit or give back --outcome--> ReleaseSource

    The source blocks are released after the hand-off's outcome, whatever it is: nothing reads them any more then.
    """

    def __init__(self, context: RoleContext, work: Work, message: worker_pb2.Prefill) -> None:
        self._context = context
        self._work = work
        self._handoff = context.kv.send(work, message.grant, message.decode_address)
        self._compute_us = 0
        self._computed = False
        self._tokens_sequence = 0

    def start(self) -> None:
        self._context.entrance.submit(Submit(self._work, "prefill"))
        self._context.tasks.spawn(self._settle(), self._failed)

    def engine_event(self, event: DispatchEvent) -> None:
        match event:
            case Started():
                self._handoff.source_blocks(event.blocks)
            case KvReady():
                self._handoff.kv_ready(event.layer, event.first_block, event.block_count)
            case PrefillDone():
                self._prefill_done(event)
            case WorkFailed():
                self._work_failed(event)
            case _:
                pass  # Reserved and ReserveRefused answer commands of the other role

    def tokens_ended(self, sequence: int) -> None:
        self._tokens_sequence = sequence  # PrefillDone follows and gives the reservation back

    def cancel(self) -> None:
        self._context.engine.send(Cancel(self._work.dispatch))
        self._handoff.abort(Cancelled("The request was cancelled."))

    def _prefill_done(self, event: PrefillDone) -> None:
        self._computed = True
        self._compute_us = event.compute_us
        if event.going_on:
            self._handoff.finish(event.going_on)
        else:
            self._handoff.abort(None)

    def _work_failed(self, event: WorkFailed) -> None:
        error = error_from_reason(event.reason, event.message)
        if event.choices:
            self._context.reports.failed(self._work.dispatch, error, event.choices)
        record = self._context.dispatches.get(self._work.dispatch)
        if not event.choices or record is None or record.ended:
            self._computed = True  # the engine has dropped it
            self._handoff.abort(error)

    async def _settle(self) -> None:
        outcome = await self._handoff.outcome()
        engine, dispatch, reports = self._context.engine, self._work.dispatch, self._context.reports
        if not self._computed:
            engine.send(Cancel(dispatch))
        engine.send(ReleaseSource(dispatch))
        if outcome.error is not None:
            reports.failed(dispatch, outcome.error)
        elif outcome.activated:
            sequence = reports.handoff(dispatch, worker_pb2.HANDOFF_STAGE_COMMITTED, self._figures(outcome))
            reports.settle(dispatch, sequence)
        else:
            reports.settle(dispatch, self._tokens_sequence)

    def _failed(self, error: PdserveError) -> None:
        self._context.reports.failed(self._work.dispatch, error)

    def _figures(self, outcome: HandoffOutcome) -> HandoffFigures:
        return HandoffFigures(
            transport=outcome.transport,
            size_bytes=outcome.bytes,
            segments=outcome.segments,
            prefill_us=self._compute_us,
            transfer_us=outcome.transfer_us,
            exposed_us=outcome.exposed_us,
        )
