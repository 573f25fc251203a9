"""Owns which dispatches exist, where they run and what burden they are there, and the stages of their timelines."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from controller.dispatch import Dispatch
from controller.fleet import Fleet
from controller.live_request import LiveRequest
from controller.operations import StageName
from controller.worker_record import Burden

SUSPECTS_KEPT = 64  # per worker
SUSPICION_S = 5.0  # within which a failed hand-off may turn out to have been its worker's death
_ORDER: dict[StageName, int] = {"queue": 0, "reserve": 1, "prefill": 2, "transfer": 3, "decode": 4}


@dataclass(frozen=True, slots=True)
class Suspect:
    at_s: float
    live: LiveRequest
    attempt: int
    choices: tuple[int, ...]
    computing: bool


class DispatchTable:
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._lives: dict[int, LiveRequest] = {}
        self._at: dict[str, dict[Dispatch, None]] = {}
        self._suspects: dict[str, deque[Suspect]] = {}
        self._reserving: dict[Dispatch, None] = {}

    # ---- requests

    def add_live(self, live: LiveRequest) -> None:
        self._lives[live.key] = live

    def drop_live(self, live: LiveRequest) -> None:
        self._lives.pop(live.key, None)

    def live(self, key: int) -> LiveRequest | None:
        return self._lives.get(key)

    def lives(self) -> list[LiveRequest]:
        return list(self._lives.values())

    # ---- dispatches

    def find(self, key: int, attempt: int) -> Dispatch | None:
        live = self._lives.get(key)
        return live.dispatches.get(attempt) if live is not None else None

    def at(self, worker_id: str) -> list[Dispatch]:
        return list(self._at.get(worker_id, ()))

    def holds(self, dispatch: Dispatch) -> bool:
        return dispatch.live.dispatches.get(dispatch.attempt) is dispatch

    def add(self, dispatch: Dispatch, burdens: dict[str, Burden]) -> None:
        dispatch.live.dispatches[dispatch.attempt] = dispatch
        if dispatch.split:
            self._reserving[dispatch] = None
        for worker_id, burden in burdens.items():
            self._at.setdefault(worker_id, {})[dispatch] = None
            dispatch.burdens[worker_id] = burden
            record = self._fleet.record(worker_id)
            if record is not None:
                record.bear(burden)
                record.dispatches += 1

    def remove(self, dispatch: Dispatch, now: float) -> None:
        for worker_id in list(dispatch.burdens):
            self.leave(dispatch, worker_id)
        self._reserving.pop(dispatch, None)
        dispatch.live.dispatches.pop(dispatch.attempt, None)
        dispatch.clock.ended_s = now

    def leave(self, dispatch: Dispatch, worker_id: str) -> None:
        """That worker's part is over."""
        burden = dispatch.burdens.pop(worker_id, None)
        if burden is None:
            return
        self._at[worker_id].pop(dispatch, None)
        if not self._at[worker_id]:
            del self._at[worker_id]
        record = self._fleet.record(worker_id)
        if record is not None:
            record.relieve(burden)
            record.dispatches -= 1

    def _set_burden(self, dispatch: Dispatch, worker_id: str, burden: Burden) -> None:
        before = dispatch.burdens.get(worker_id)
        if before is None or before == burden:
            return
        dispatch.burdens[worker_id] = burden
        record = self._fleet.record(worker_id)
        if record is not None:
            record.relieve(before)
            record.bear(burden)

    # ---- progress

    def granted(self, dispatch: Dispatch) -> None:
        """The answer came with a report in which the reserved blocks are counted."""
        self._reserving.pop(dispatch, None)
        self._set_burden(dispatch, dispatch.pick.decode_worker, Burden(sequences=len(dispatch.group.choices)))

    def unanswered(self, now: float) -> list[Dispatch]:
        return [dispatch for dispatch in self._reserving if dispatch.answer_by_s <= now]

    def prefilled(self, dispatch: Dispatch, now: float) -> None:
        """The first token came: from here on the prefill worker only sends."""
        self._set_burden(dispatch, dispatch.pick.prefill_worker, Burden())
        self.next_stage(dispatch, "transfer", dispatch.pick.prefill_worker, now)

    def decoding(self, dispatch: Dispatch, now: float) -> None:
        if dispatch.split:
            self.prefilled(dispatch, now)
            self.leave(dispatch, dispatch.pick.prefill_worker)
        else:
            self.granted(dispatch)
        self.next_stage(dispatch, "decode", dispatch.pick.decode_worker, now)

    def next_stage(self, dispatch: Dispatch, name: StageName, worker_id: str, now: float) -> None:
        """Choices of one dispatch advance one by one; the first of them moves its clock, and it never goes back."""
        if _ORDER[dispatch.clock.name] >= _ORDER[name]:
            return
        dispatch.clock.ended_s = now
        dispatch.clock = dispatch.live.timeline.begin(name, dispatch.attempt, worker_id, now)

    # ---- prefill workers that may have died

    def suspect(self, dispatch: Dispatch, choices: tuple[int, ...], now: float) -> None:
        suspects = self._suspects.setdefault(dispatch.pick.prefill_worker, deque(maxlen=SUSPECTS_KEPT))
        suspects.append(Suspect(now, dispatch.live, dispatch.attempt, choices, dispatch.computing))

    def take_suspects(self, worker_id: str, now: float) -> list[Suspect]:
        """Requests that a worker which is lost now was computing when their hand-off failed."""
        return [each for each in self._suspects.pop(worker_id, ()) if now - each.at_s <= SUSPICION_S]
