"""Owns folding what workers say into the requests: columns of tokens, starts, hand-off reports, failures.

A fault while one request is folded fails that request alone; a malformed message ends the session that sent it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from controller.dispatch_table import DispatchTable
from controller.dispatcher import Dispatcher
from controller.lifecycle import Activated, Refused, Token
from controller.live_request import LiveRequest
from controller.request import FinishReason, Logprobs
from controller.request_metrics import RequestObserver
from pdserve.errors import (
    InternalError,
    LayoutMismatch,
    NoCapacity,
    PdserveError,
    TransferFailed,
    WorkerLost,
    error_from_reason,
)
from pdserve.v1 import types_pb2, worker_pb2
from service_kit.logs import get_logger

_FINISH: tuple[FinishReason | None, ...] = (None, "stop", "length", "cancelled")

log = get_logger(__name__)


class DispatchEvents:
    def __init__(
        self,
        table: DispatchTable,
        dispatcher: Dispatcher,
        observer: RequestObserver,
        clock: Callable[[], float],
    ) -> None:
        self._table = table
        self._dispatcher = dispatcher
        self._observer = observer
        self._clock = clock

    def received(self, worker_id: str, response: worker_pb2.SessionResponse) -> None:
        match response.WhichOneof("event"):
            case "tokens":
                self._tokens(response.tokens)
            case "started":
                self._started(response.started)
            case "reserve":
                self._dispatcher.reserve_answered(worker_id, response.reserve)
            case "handoff":
                self._handoff(worker_id, response.handoff)
            case "failed":
                self._failed(worker_id, response.failed)
            case _:
                raise AssertionError("the fleet hands on dispatch events only")

    # ---- tokens

    def _tokens(self, batch: worker_pb2.TokenBatch) -> None:
        now, touched, gaps_s = self._clock(), list[LiveRequest](), list[float]()
        for each in batch.prompt_logprobs:
            self._prompt_logprobs(each, touched)
        rows = [_logprobs(row) for row in batch.logprobs] or None
        columns = zip(
            batch.request_keys, batch.attempts, batch.choices, batch.indices, batch.token_ids, batch.finish_reasons,
            rows if rows is not None else [None] * len(batch.token_ids), strict=True,
        )  # fmt: skip
        live_of = self._table.live
        for key, attempt, choice, index, token_id, finish, row in columns:
            live = live_of(key)
            if live is None or choice >= live.request.n:
                continue
            try:
                self._column(live, choice, Token(attempt, index, token_id, _FINISH[finish], row), now, gaps_s)
            except Exception as error:
                self._broken(live, error, now)
            if not live.touched:
                live.touched = True
                touched.append(live)
        self._observer.tokens(len(batch.token_ids), gaps_s)
        for live in touched:
            live.touched = False
            self._settle(live, now)

    def _column(self, live: LiveRequest, choice: int, token: Token, now: float, gaps_s: list[float]) -> None:
        if token.finish == "cancelled":
            error = WorkerLost("The worker cancelled the dispatch by itself.")
            live.apply(choice, Refused(token.attempt, error), now)
            return
        output = live.outputs[choice]
        count, before_s = len(output.token_ids), output.last_token_s
        live.apply(choice, token, now)
        if len(output.token_ids) == count:
            return
        if count:
            gaps_s.append(now - before_s)
        if live.timeline.first_token_s is None:
            live.timeline.first_token_s = now
            self._observer.first_token(live, now)
        if live.migration:
            self._observer.migrated(live.take_migration(), "resumed")

    def _settle(self, live: LiveRequest, now: float) -> None:
        try:
            self._dispatcher.settle(live, now)
        except Exception as error:
            self._broken(live, error, now)

    def _broken(self, live: LiveRequest, error: Exception, now: float) -> None:
        log.exception("request_broken", error, request_id=live.request.request_id)
        live.fail(InternalError("The controller failed on this request; its log has the cause."), now)
        live.wake()

    def _prompt_logprobs(self, message: worker_pb2.PromptLogprobs, touched: list[LiveRequest]) -> None:
        dispatch = self._table.find(message.dispatch.request_key, message.dispatch.attempt)
        if dispatch is None:
            return
        dispatch.live.prompt_logprobs(tuple(_logprobs(row) or Logprobs((), ()) for row in message.positions))
        if not dispatch.live.touched:
            dispatch.live.touched = True
            touched.append(dispatch.live)

    # ---- reports

    def _started(self, message: worker_pb2.DispatchStarted) -> None:
        dispatch = self._table.find(message.dispatch.request_key, message.dispatch.attempt)
        if dispatch is None:
            return
        dispatch.computing = True
        dispatch.notes.cached_tokens = message.cached_tokens
        dispatch.notes.queue_s = message.queue_us / 1e6
        dispatch.notes.blended_tokens = message.blended_tokens
        dispatch.live.started(message.cached_tokens, message.blended_tokens)
        self._observer.blended(message.blended_tokens)
        dispatch.live.wake()

    def _handoff(self, worker_id: str, report: worker_pb2.HandoffReport) -> None:
        if report.stage == worker_pb2.HANDOFF_STAGE_COMMITTED:
            self._observer.handed_over(report)
        dispatch = self._table.find(report.dispatch.request_key, report.dispatch.attempt)
        if dispatch is None:
            return
        now, live, notes = self._clock(), dispatch.live, dispatch.notes
        if report.stage == worker_pb2.HANDOFF_STAGE_FAILED:
            self._attempt_failed(dispatch.attempt, live, worker_id, (), TransferFailed("The hand-off failed."))
            return
        notes.kv_bytes, notes.segments = max(notes.kv_bytes, report.bytes), max(notes.segments, report.segments)
        notes.transfer_s = max(notes.transfer_s, report.transfer_us / 1e6)
        notes.prefill_s = report.prefill_us / 1e6 or notes.prefill_s
        notes.exposed_s = report.exposed_us / 1e6 or notes.exposed_s
        for choice in sorted(dispatch.open):
            live.apply(choice, Activated(dispatch.attempt), now)
        self._settle(live, now)

    def _failed(self, worker_id: str, message: worker_pb2.DispatchFailed) -> None:
        dispatch = self._table.find(message.dispatch.request_key, message.dispatch.attempt)
        if dispatch is None:
            return
        error = error_from_reason(message.reason, message.message)
        self._attempt_failed(dispatch.attempt, dispatch.live, worker_id, tuple(message.choices), error)

    def _attempt_failed(
        self, attempt: int, live: LiveRequest, worker_id: str, choices: Sequence[int], error: PdserveError
    ) -> None:
        now, dispatch = self._clock(), live.dispatches[attempt]
        if dispatch.stage == "reserving":
            self._dispatcher.reservation_failed(dispatch, error)
            return
        hit = set(choices) & dispatch.open if choices else set(dispatch.open)
        if isinstance(error, TransferFailed | LayoutMismatch):
            self._observer.transfer_failed(error)
            live.bad_pairs.add((dispatch.pick.prefill_worker, dispatch.pick.decode_worker))
            live.migration = "handoff_failed"
            self._table.suspect(dispatch, tuple(sorted(hit)), now)
        elif not error.retryable and error.reason != "cancelled":
            self._dispatcher.fail(live, error)
            return
        refuser = worker_id if isinstance(error, NoCapacity) else ""
        self._dispatcher.refused(dispatch, hit, error, now)
        self._dispatcher.settle(live, now, error, refuser)


def _logprobs(row: types_pb2.TokenLogprobs) -> Logprobs | None:
    return Logprobs(tuple(row.token_ids), tuple(row.logprobs)) if row.token_ids else None
