"""Owns one incoming hand-off from grant to the end of its writer: posts receives, verifies, activates or fences."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from kv_transfer.arena import Arena
from kv_transfer.background import BackgroundTasks
from kv_transfer.layout import TransferPlan
from kv_transfer.liveness import BEATS_PER_HEARTBEAT, Liveness
from kv_transfer.outbox import Outbox
from kv_transfer.reservation import Destination, ReceivedReport, ReceiverCounters, Reservation
from kv_transfer.segment_receiver import SegmentReceiver
from kv_transfer.segment_rules import SegmentRules
from kv_transfer.transport import Connection
from kv_transfer.writer_lease import (
    AcceptWriter,
    Activate,
    CloseEndpoint,
    EndpointDied,
    EndWriter,
    RefuseBegin,
    TellWriter,
    WriterAborted,
    WriterBegun,
    WriterCommand,
    WriterCut,
    WriterEnded,
    WriterEvent,
    WriterFencing,
    WriterGranted,
    WriterHeard,
    WriterSettled,
    WriterState,
    WriterStopped,
    WriterTick,
    WriterVerified,
    WriterWriting,
    step_writer,
    writer_deadline_s,
)
from pdserve.errors import KvCorrupt, LeaseExpired, PdserveError, TransferFailed, error_from_reason
from pdserve.v1 import handoff_pb2
from service_kit.config import TransferConfig
from service_kit.logs import get_logger

_log = get_logger(__name__)

Answers = Outbox[handoff_pb2.HandoffResponse]


@dataclass(frozen=True, slots=True)
class IncomingParts:
    """What all incoming hand-offs of a worker share."""

    arena: Arena
    plan: TransferPlan
    config: TransferConfig
    destination: Destination
    counters: ReceiverCounters


class IncomingHandoff:
    """The shell of one writer lease. All methods are called on the event loop; only the receives run in tasks."""

    def __init__(
        self,
        reservation: Reservation,
        rules: SegmentRules,
        transport: str,
        parts: IncomingParts,
        on_end: Callable[[], None],
    ) -> None:
        self.reservation = reservation
        self.transport = transport
        self._rules = rules
        self._parts = parts
        self._on_end = on_end
        config = parts.config
        self._state: WriterState = WriterGranted(
            attempt=reservation.dispatch.attempt,
            expires_s=time.monotonic() + config.lease_s,
            ttl_s=config.lease_s,
            grace_s=config.heartbeat_s * 2,
        )
        self._timer: asyncio.TimerHandle | None = None
        self._tasks = BackgroundTasks()
        self._segments = SegmentReceiver(parts.arena, reservation.blocks, rules, config.lease_s, self)
        self._liveness = Liveness(config.heartbeat_misses)
        self._answers: Answers | None = None
        self._connection: Connection | None = None
        self._commit: handoff_pb2.Commit | None = None
        self._fin = False
        self._incarnation = 0
        self._schedule_tick()

    # ---- what the session says

    def begin(self, begin: handoff_pb2.Begin, answers: Answers) -> bool:
        """True where this Begin is the lease's one writer; else it was refused on `answers`."""
        event = WriterBegun(begin.dispatch.attempt, begin.incarnation)
        self._state, commands = step_writer(self._state, event, time.monotonic())
        for command in commands:
            if isinstance(command, RefuseBegin):
                _refuse(answers, command.error)
                return False
        self._answers = answers
        self._incarnation = begin.incarnation
        self._schedule_tick()
        return True

    def attach(self, connection: Connection) -> None:
        """The data connection is there: the writer may announce segments."""
        self._connection = connection
        if isinstance(self._state, WriterWriting):
            lease_ms = round(self._parts.config.lease_s * 1000)
            self._answer(
                handoff_pb2.HandoffResponse(accepted=handoff_pb2.Accepted(lease_ms=lease_ms, runs=self._rules.runs))
            )
            self._tasks.spawn(self._beat(), "incoming-beat")

    def on_request(self, request: handoff_pb2.HandoffRequest) -> None:
        self._liveness.heard()
        self._apply(WriterHeard(self._incarnation))
        match request.WhichOneof("message"):
            case "segment":
                self._on_segment(request.segment)
            case "commit":
                self._on_commit(request.commit)
            case "abort":
                self._on_abort(request.abort)
            case "heartbeat":
                pass
            case "begin":
                self._apply(WriterStopped(TransferFailed("A session has one Begin only.")))
            case None:
                self._apply(WriterCut(TransferFailed("Empty or unknown message on the hand-off's session.")))

    def on_half_close(self) -> None:
        """No more messages come. That is no FIN: a stream that breaks looks the same, Abort and Commit are explicit."""
        if self._commit is None and not self._fin:
            self._apply(WriterCut(TransferFailed("The prefill worker's session was lost.")))

    def dismiss(self, error: PdserveError) -> None:
        """Ends a writer that was never accepted: it has announced nothing."""
        self._fin = True
        self.stop(error)

    def stop(self, error: PdserveError) -> None:
        """Ends the hand-off from this side: the writer is told, its bytes in flight are waited for."""
        self._apply(WriterStopped(error))
        self.idle()

    def cut(self, error: PdserveError) -> None:
        """The session is lost or the writer cannot be believed: the data connection is closed."""
        self._apply(WriterCut(error))

    @property
    def ended(self) -> bool:
        return isinstance(self._state, WriterEnded)

    # ---- messages

    def _on_segment(self, segment: handoff_pb2.Segment) -> None:
        if self._connection is None or self._fin or self._commit is not None:
            self._apply(WriterCut(TransferFailed("Segment out of order.")))
            return
        problem = self._segments.post(segment, self._connection)
        if problem is not None:
            # Its bytes may come, and no receive would be posted for them.
            self._apply(WriterCut(TransferFailed(f"Segment refused: {problem}.")))

    def _on_commit(self, commit: handoff_pb2.Commit) -> None:
        if self._commit is None:
            self._commit = commit
            self.idle()

    def _on_abort(self, abort: handoff_pb2.Abort) -> None:
        error = error_from_reason(abort.reason, abort.message) if abort.reason else None
        self._fin = True
        self._apply(WriterAborted(error))
        self.idle()

    # ---- the receives (ReceiveListener)

    def verified(self, tag: int) -> None:
        if isinstance(self._state, WriterWriting):
            self._answer(handoff_pb2.HandoffResponse(segment_done=handoff_pb2.SegmentDone(tag=tag)))

    def corrupt(self, error: KvCorrupt) -> None:
        self._parts.counters.verify_failures += 1
        self._apply(WriterStopped(error))

    def broken(self, error: PdserveError) -> None:
        self._apply(WriterCut(error))

    def idle(self) -> None:
        """Goes on where that waits for the last receive."""
        if self._segments.posted:
            return
        match self._state:
            case WriterWriting() if self._commit is not None:
                problem = self._segments.commit_problem(self._commit)
                self._apply(WriterVerified() if problem is None else WriterStopped(TransferFailed(problem)))
            case WriterFencing() if self._fin or self._commit is not None:
                self._apply(WriterSettled())
            case _:
                pass

    # ---- the lease

    def _apply(self, event: WriterEvent) -> None:
        self._state, commands = step_writer(self._state, event, time.monotonic())
        for command in commands:
            self._run(command)
        self._schedule_tick()

    def _run(self, command: WriterCommand) -> None:
        match command:
            case TellWriter():
                if self._answers is not None:
                    _refuse(self._answers, command.error)
            case CloseEndpoint():
                _log.warning("handoff_writer_cut_off", request_key=self.reservation.dispatch.request_key)
                self._tasks.spawn(self._close_endpoint(), "incoming-close-endpoint")
            case Activate():
                self._activate()
            case EndWriter():
                self._end_writer(command.error)
            case AcceptWriter() | RefuseBegin():
                raise AssertionError("only Begin gives these")

    async def _close_endpoint(self) -> None:
        if self._connection is not None:
            await self._connection.close()
        await self._segments.quiet()
        self._apply(EndpointDied())

    def _activate(self) -> None:
        assert self._commit is not None
        first_tokens = tuple((first.choice, first.token_id) for first in self._commit.first_tokens)
        received = self._segments
        report = ReceivedReport(self.transport, received.bytes, received.segments, received.transfer_us)
        self._parts.destination.activate(self.reservation.dispatch, first_tokens, report)  # the next token waits for it
        self._finish(handoff_pb2.HandoffResponse(activated=handoff_pb2.Activated()))

    def _end_writer(self, error: PdserveError | None) -> None:
        if error is not None:
            self._parts.counters.expired_leases += isinstance(error, LeaseExpired)
        self._finish(handoff_pb2.HandoffResponse(released=handoff_pb2.Released()))
        self._parts.destination.writer_done(self.reservation.dispatch, error)

    def _finish(self, last_word: handoff_pb2.HandoffResponse) -> None:
        self._answer(last_word)
        if self._answers is not None:
            self._answers.close()
        self._on_end()

    def _answer(self, response: handoff_pb2.HandoffResponse) -> None:
        if self._answers is not None:
            self._answers.put(response)

    async def _beat(self) -> None:
        config = self._parts.config
        while not self.ended:
            await asyncio.sleep(config.heartbeat_s / BEATS_PER_HEARTBEAT)
            self._answer(handoff_pb2.HandoffResponse(heartbeat=handoff_pb2.Heartbeat()))
            if not self._liveness.beat() and isinstance(self._state, WriterWriting):
                self._apply(WriterCut(TransferFailed("The prefill worker is silent: no heartbeat.")))

    def _schedule_tick(self) -> None:
        deadline_s = writer_deadline_s(self._state)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if deadline_s is not None:
            delay_s = max(0.0, deadline_s - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._apply, WriterTick())

    async def close(self) -> None:
        """The process ends: no word to anybody."""
        if self._timer is not None:
            self._timer.cancel()
        self._segments.cancel()
        await self._tasks.close()


def _refuse(answers: Answers, error: PdserveError) -> None:
    answers.put(handoff_pb2.HandoffResponse(refused=handoff_pb2.Refused(reason=error.reason, message=error.message)))
