"""Owns what the worker tells the owner of a dispatch: tokens, starts, hand-offs, failures, and the end of its record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.protocol import Dispatch, PromptLogprobs, Started, StepTokens
from pdserve.errors import PdserveError
from pdserve.v1 import worker_pb2
from service_kit.logs import get_logger
from worker_runtime.dispatches import CANCELLED, DispatchRecord, DispatchTable, record_step
from worker_runtime.messages import dispatch_to_proto, prompt_logprobs_to_proto
from worker_runtime.session import SessionHub
from worker_runtime.token_batches import replayed_batch, token_batch

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class HandoffFigures:
    """Measurements of one hand-off; what this side cannot know is 0."""

    transport: str
    size_bytes: int = 0
    segments: int = 0
    prefill_us: int = 0
    transfer_us: int = 0
    exposed_us: int = 0


class DispatchReports:
    def __init__(self, table: DispatchTable, hub: SessionHub, load: Callable[[], worker_pb2.LoadReport]) -> None:
        self._table = table
        self._hub = hub
        self._load = load

    def step(self, event: StepTokens) -> None:
        """One message per owner with all its tokens of the step."""
        for owner, columns in record_step(self._table, event).items():
            sequence = self._hub.report(owner, worker_pb2.SessionResponse(tokens=token_batch(event, columns)))
            for column in columns:
                if event.finish[column]:
                    self._ended(Dispatch(event.request_keys[column], event.attempts[column]), sequence)

    def prompt_logprobs(self, event: PromptLogprobs) -> None:
        batch = worker_pb2.TokenBatch(prompt_logprobs=[prompt_logprobs_to_proto(event)])
        self._tell(event.dispatch, worker_pb2.SessionResponse(tokens=batch))

    def started(self, event: Started) -> None:
        self._tell(
            event.dispatch,
            worker_pb2.SessionResponse(
                started=worker_pb2.DispatchStarted(
                    dispatch=dispatch_to_proto(event.dispatch),
                    cached_tokens=event.cached_tokens,
                    blended_tokens=event.blended_tokens,
                    queue_us=event.queue_us,
                )
            ),
        )

    def granted(self, dispatch: Dispatch, grant: worker_pb2.Grant) -> None:
        self._tell(dispatch, self._reserve_result(dispatch, worker_pb2.ReserveResult(granted=grant)))

    def refused(self, controller_id: str, dispatch: Dispatch, error: PdserveError) -> None:
        """The answer to a Reserve that has no record, or whose record goes with it: the same dispatch may be asked again."""
        refusal = worker_pb2.Refusal(reason=error.reason, message=error.message)
        result = self._reserve_result(dispatch, worker_pb2.ReserveResult(refused=refusal))
        self._hub.report(controller_id, result)
        self._table.forget(dispatch)

    def handoff(self, dispatch: Dispatch, stage: worker_pb2.HandoffStage.ValueType, figures: HandoffFigures) -> int:
        return self._tell(
            dispatch,
            worker_pb2.SessionResponse(
                handoff=worker_pb2.HandoffReport(
                    dispatch=dispatch_to_proto(dispatch),
                    stage=stage,
                    transport=figures.transport,
                    bytes=figures.size_bytes,
                    prefill_us=figures.prefill_us,
                    transfer_us=figures.transfer_us,
                    exposed_us=figures.exposed_us,
                    segments=figures.segments,
                )
            ),
        )

    def failed(self, dispatch: Dispatch, error: PdserveError, choices: Sequence[int] = ()) -> None:
        """Nothing of it will come any more (of `choices`, where given): the record ends."""
        record = self._table.get(dispatch)
        if record is None or record.ended:
            return
        log.warning("dispatch_failed", request_id=record.work.request_id, reason=error.reason, message=error.message)
        sequence = self.refuse(record.owner, dispatch, error, choices)
        for choice in choices or record.choices:
            if choice in record.choices:
                record.choices[choice].finish = CANCELLED
        if record.tokens_ended:
            self._table.settle(dispatch, sequence)

    def refuse(self, controller_id: str, dispatch: Dispatch, error: PdserveError, choices: Sequence[int] = ()) -> int:
        """The answer to a command whose dispatch has no record here."""
        return self._hub.report(
            controller_id,
            worker_pb2.SessionResponse(
                failed=worker_pb2.DispatchFailed(
                    dispatch=dispatch_to_proto(dispatch), choices=choices, reason=error.reason, message=error.message
                )
            ),
        )

    def replay_tokens(self, record: DispatchRecord, next_index: dict[int, int]) -> None:
        """Repeats, for a controller that adopted the dispatch, each choice's tokens from its next index on."""
        batch = replayed_batch(record, next_index)
        sequence = self._hub.report(record.owner, worker_pb2.SessionResponse(tokens=batch))
        if record.ended:
            record.final_sequence = sequence

    def settle(self, dispatch: Dispatch, sequence: int) -> None:
        self._table.settle(dispatch, sequence)

    def _ended(self, dispatch: Dispatch, sequence: int) -> None:
        record = self._table.get(dispatch)
        if record is not None and record.tokens_ended:
            record.handler.tokens_ended(sequence)

    def _tell(self, dispatch: Dispatch, response: worker_pb2.SessionResponse) -> int:
        record = self._table.get(dispatch)
        return 0 if record is None or record.ended else self._hub.report(record.owner, response)

    def _reserve_result(self, dispatch: Dispatch, result: worker_pb2.ReserveResult) -> worker_pb2.SessionResponse:
        result.dispatch.CopyFrom(dispatch_to_proto(dispatch))
        result.load.CopyFrom(self._load())
        return worker_pb2.SessionResponse(reserve=result)
