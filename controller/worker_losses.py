"""Owns what the loss of a worker, or of the commands that a broken stream swallowed, means for the dispatches there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from controller import work_messages
from controller.dispatch_table import Suspect
from controller.dispatcher import Dispatcher
from controller.fleet import Fleet
from controller.lifecycle import Lost
from controller.suspicion import Present, blame
from pdserve.errors import WorkerLost
from pdserve.v1 import worker_pb2


class WorkerLosses:
    def __init__(self, fleet: Fleet, dispatcher: Dispatcher, clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._table = dispatcher.table
        self._clock = clock

    def lost(self, worker_id: str, error: WorkerLost, *, died: bool) -> None:
        """`died`: what it computed may have killed it; else it only fell silent."""
        now = self._clock()
        suspects = self._table.take_suspects(worker_id, now)
        blamed = blame(self._present(worker_id, suspects)) if died else {}
        counted: set[tuple[int, int]] = set()  # (request key, choice): one death counts once
        for dispatch in self._table.at(worker_id):
            live = dispatch.live
            if not self._table.holds(dispatch):
                continue  # its request failed with one before it
            if dispatch.stage == "reserving":
                self._fleet.send(dispatch.pick.decode_worker, work_messages.cancel(live.key, dispatch.attempt))
                self._dispatcher.requeue_unserved(dispatch, "lost", error)
                continue
            side = dispatch.side_of(worker_id)
            for choice in sorted(dispatch.open):
                if side == "prefill":
                    counted.add((live.key, choice))
                live.apply(choice, Lost(dispatch.attempt, side, error, blamed.get(live.key, "none")), now)
            if live.wants.requeue:
                live.migration = "prefill_lost" if side == "prefill" else "decode_lost"
            self._dispatcher.settle(live, now, error)
            self._table.leave(dispatch, worker_id)
        for suspect in suspects:
            to_blame = blamed.get(suspect.live.key, "none")
            for choice in suspect.choices:
                if (suspect.live.key, choice) in counted:
                    continue
                suspect.live.apply(choice, Lost(suspect.attempt, "prefill", error, to_blame), now)
            self._dispatcher.settle(suspect.live, now, error)
        self._dispatcher.pump()

    def _present(self, worker_id: str, suspects: Iterable[Suspect]) -> Iterator[Present]:
        """The prompts that it had and had not finished, as far as is known."""
        for dispatch in self._table.at(worker_id):
            live, side = dispatch.live, dispatch.side_of(worker_id)
            if dispatch.stage == "running" and side != "decode" and live.prefills(dispatch.open):
                yield Present(live.key, dispatch.computing, live.deaths)
        for suspect in suspects:
            if not suspect.live.done:
                yield Present(suspect.live.key, suspect.computing, suspect.live.deaths)

    def reconciled(self, worker_id: str, snapshot: worker_pb2.WorkerSnapshot, own_prefix: int) -> None:
        """After a redial: commands that the broken stream swallowed are found by what the worker does not hold."""
        now = self._clock()
        held = {(each.dispatch.request_key, each.dispatch.attempt) for each in snapshot.held}
        for dispatch in self._table.at(worker_id):
            if (dispatch.live.key, dispatch.attempt) in held or not self._table.holds(dispatch):
                continue
            error = WorkerLost(f"Worker {worker_id} did not hold the dispatch after a reconnect.")
            if dispatch.stage == "reserving":
                self._dispatcher.requeue_unserved(dispatch, "lost", error)
            else:
                self._dispatcher.refused(dispatch, dispatch.open, error, now)
                self._dispatcher.settle(dispatch.live, now, error)
        for key, attempt in held:
            if key >> 32 == own_prefix and self._table.find(key, attempt) is None:
                self._fleet.send(worker_id, work_messages.cancel(key, attempt))
