"""Owns who computes what: takes groups to workers, answers what they say to that, and starts again what was lost.

Everything here runs to completion without waiting; time comes in through `tick`.
"""

from __future__ import annotations

from collections.abc import Callable

from controller import work_messages
from controller.admission import Waiting
from controller.dispatch import Dispatch, Group, begin, burdens_of
from controller.dispatch_table import DispatchTable
from controller.fleet import Fleet
from controller.lifecycle import FINAL, Dispatched, Refused
from controller.live_request import LiveRequest
from controller.operations import Outcome as AttemptOutcome
from controller.operations import RequestState
from controller.placement.decision import Pick
from controller.request_metrics import RequestObserver
from controller.waiting_room import Placing, WaitingRoom
from controller.work_orders import WorkOrders
from pdserve.errors import InvalidRequest, NoCapacity, PdserveError, WorkerLost
from pdserve.v1 import worker_pb2
from service_kit.logs import get_logger

log = get_logger(__name__)


class Dispatcher:
    def __init__(
        self,
        fleet: Fleet,
        room: WaitingRoom,
        orders: WorkOrders,
        reserve_answer_s: float,
        observer: RequestObserver,
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._room = room
        self._orders = orders
        self._reserve_answer_s = reserve_answer_s
        self._observer = observer
        self._clock = clock
        self._placing = Placing(self._dispatch, self.fail)
        self._pump_due = False
        self.table = DispatchTable(fleet)
        self.on_done: Callable[[LiveRequest], None] = lambda live: None

    def admit(self, live: LiveRequest) -> None:
        """A request that cannot be placed at once while the queue is full fails with Overloaded."""
        entry = self._room.enter(Group(live, tuple(range(live.request.n))), self._clock(), retry=False)
        self.pump()
        refusal = self._room.refusal(entry)
        if refusal is not None:
            self.fail(live, refusal)

    def pump(self, changed_worker: str = "") -> None:
        """Places what can be placed now."""
        self._room.place_waiting(self._clock(), self._placing, changed_worker)

    # ---- to the workers

    def _dispatch(self, entry: Waiting[Group], pick: Pick, attempt: int) -> None:
        now, group = self._clock(), entry.item
        decode = self._fleet.record(pick.decode_worker)
        assert decode is not None, "picked from a snapshot of this moment"
        try:
            work = self._orders.order(group, attempt, pick)
        except InvalidRequest as refusal:
            self.fail(group.live, refusal)
            return
        dispatch = begin(entry, attempt, pick, work, now, self._reserve_answer_s)
        tokens = group.live.request.prompt_tokens + dispatch.notes.resumed_tokens
        self.table.add(dispatch, burdens_of(group, pick, tokens, decode.view().block_tokens))
        if dispatch.split:
            self._fleet.send(pick.decode_worker, work_messages.reserve(work, pick.transport))
        else:
            self._run(dispatch, now)
            self._fleet.send(pick.decode_worker, work_messages.generate(work))

    def _run(self, dispatch: Dispatch, now: float) -> None:
        dispatch.stage = "running"
        for choice in dispatch.group.choices:
            dispatch.live.apply(choice, Dispatched(dispatch.attempt, dispatch.split), now)
        dispatch.live.wants.entered.clear()

    def reserve_answered(self, worker_id: str, result: worker_pb2.ReserveResult) -> None:
        dispatch = self.table.find(result.dispatch.request_key, result.dispatch.attempt)
        if dispatch is None or dispatch.stage != "reserving" or dispatch.pick.decode_worker != worker_id:
            if result.HasField("granted"):
                self._fleet.send(worker_id, work_messages.cancel(result.dispatch.request_key, result.dispatch.attempt))
            return
        if result.HasField("granted"):
            self._granted(dispatch, result.granted)
        else:
            self.reservation_failed(dispatch, work_messages.refusal_error(result.refused))

    def _granted(self, dispatch: Dispatch, grant: worker_pb2.Grant) -> None:
        now, pick = self._clock(), dispatch.pick
        self.table.granted(dispatch)
        self.table.next_stage(dispatch, "prefill", pick.prefill_worker, now)
        decode = self._fleet.record(pick.decode_worker)
        assert decode is not None
        self._run(dispatch, now)
        self._fleet.send(pick.prefill_worker, work_messages.prefill(dispatch.work, grant, decode.info.address))

    def reservation_failed(self, dispatch: Dispatch, error: PdserveError) -> None:
        """The next candidate; where everybody refuses, the group waits until something changes."""
        if not error.retryable:
            self._end_dispatch(dispatch, "refused", error)
            self.fail(dispatch.live, error)
            return
        self.requeue_unserved(dispatch, "refused", error)
        self.pump()

    def requeue_unserved(self, dispatch: Dispatch, outcome: AttemptOutcome, error: PdserveError) -> None:
        """Back to its place in the queue: nothing of it has run."""
        now, entry = self._clock(), dispatch.waiting
        self._end_dispatch(dispatch, outcome, error)
        entry.refused_now.add(dispatch.pick.decode_worker)
        self._room.enter_again(entry, now)

    # ---- from the workers: see `dispatch_events` for tokens and reports

    def refused(self, dispatch: Dispatch, choices: set[int], error: PdserveError, now: float) -> None:
        """The attempt is over for `choices`; another may do better."""
        for choice in sorted(choices & dispatch.open):
            dispatch.live.apply(choice, Refused(dispatch.attempt, error), now)

    # ---- carrying out what requests want

    def settle(self, live: LiveRequest, now: float, error: PdserveError | None = None, refuser: str = "") -> None:
        """Carries out `live.wants`. `error`: what caused it, for the record; `refuser`: who should not be asked again at once."""
        wants = live.wants
        while wants:
            cancel, requeue, entered = wants.cancel[:], wants.requeue[:], wants.entered[:]
            wants.cancel.clear()
            wants.requeue.clear()
            wants.entered.clear()
            self._send_cancels(live, cancel)
            for attempt, choice, phase in entered:
                self._entered(live, attempt, choice, phase, now, error)
            if requeue and live.error is None:
                for choices in live.groups(requeue):
                    entry = self._room.enter(Group(live, choices), now, retry=True)
                    entry.refused_now.update({refuser} - {""})
                self._pump_due = True
        live.wake()
        if live.done:
            self._finish(live, now)
        elif self._pump_due:
            self._pump_due = False
            self.pump()

    def _send_cancels(self, live: LiveRequest, cancels: list[tuple[int, int]]) -> None:
        choices_by_attempt: dict[int, set[int]] = {}
        for attempt, choice in cancels:
            choices_by_attempt.setdefault(attempt, set()).add(choice)
        for attempt, choices in choices_by_attempt.items():
            dispatch = self.table.find(live.key, attempt)
            if dispatch is None:
                continue
            named = () if choices >= dispatch.open else sorted(choices)
            for worker_id in dispatch.burdens:
                self._fleet.send(worker_id, work_messages.cancel(live.key, attempt, named))

    def _entered(
        self, live: LiveRequest, attempt: int, choice: int, phase: RequestState, now: float, error: PdserveError | None
    ) -> None:
        dispatch = self.table.find(live.key, attempt)
        if dispatch is None:
            return
        self._pump_due = self._pump_due or live.deaths > 0  # others may wait for the end of its prefill
        if phase == "TRANSFERRING":
            self.table.prefilled(dispatch, now)
        elif phase == "DECODING":
            self.table.decoding(dispatch, now)
        elif phase in FINAL or phase == "QUEUED":
            if live.states[choice].decoded:  # its last token came before the first one: no phase between was entered
                self.table.decoding(dispatch, now)
            dispatch.open.discard(choice)
            if not dispatch.open:
                outcome: AttemptOutcome = _OUTCOMES.get(phase, "lost" if isinstance(error, WorkerLost) else "failed")
                self._end_dispatch(dispatch, outcome, live.error or error)

    def _end_dispatch(self, dispatch: Dispatch, outcome: AttemptOutcome, error: PdserveError | None) -> None:
        dispatch.notes.outcome = outcome
        if error is not None and outcome not in ("finished", "cancelled"):
            dispatch.notes.reason, dispatch.notes.message = error.reason, error.message
        self.table.remove(dispatch, self._clock())

    # ---- ends

    def fail(self, live: LiveRequest, error: PdserveError) -> None:
        now = self._clock()
        live.fail(error, now)
        self.settle(live, now, error)

    def cancel(self, live: LiveRequest) -> None:
        now = self._clock()
        live.cancel(now)
        self.settle(live, now)

    def _finish(self, live: LiveRequest, now: float) -> None:
        if live.timeline.ended_s is not None:
            return
        self._room.dismiss(live, now)
        for dispatch in list(live.dispatches.values()):  # still reserving: the answer is not wanted any more
            self._fleet.send(dispatch.pick.decode_worker, work_messages.cancel(live.key, dispatch.attempt))
            self._end_dispatch(dispatch, "cancelled", None)
        live.timeline.ended_s = now
        live.refresh_timeline()
        live.timeline.refresh = None
        if live.error is not None:
            if live.migration is not None:
                self._observer.migrated(live.take_migration(), "failed")
            live.timeline.error, live.timeline.error_message = live.error.reason, live.error.message
        self._observer.ended(live)
        self.on_done(live)
        self.pump()

    def tick(self, now: float, absent_since_s: float | None) -> None:
        for dispatch in self.table.unanswered(now):
            self._fleet.send(dispatch.pick.decode_worker, work_messages.cancel(dispatch.live.key, dispatch.attempt))
            error = NoCapacity(
                f"Worker {dispatch.pick.decode_worker} did not answer within {self._reserve_answer_s:g} s."
            )
            self.requeue_unserved(dispatch, "refused", error)
        for live, failure in self._room.expired(now, absent_since_s):
            self.fail(live, failure)
        self.pump()


_OUTCOMES: dict[RequestState, AttemptOutcome] = {
    "FINISHED": "finished",
    "FAILED": "failed",
    "CANCELLED": "cancelled",
}
