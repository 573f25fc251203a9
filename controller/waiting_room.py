"""Owns the groups that have no worker: who is tried when, what placement said, and the queue stage of their timelines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from types import MappingProxyType
from typing import NamedTuple

from controller.admission import Waiting, WaitingQueue, note_shortage
from controller.chunk_reuse import RememberedReuse, blend_demand
from controller.dispatch import Group
from controller.fleet import Fleet
from controller.kv_blend import KvBlend
from controller.live_request import LiveRequest
from controller.placement.decision import Pick
from controller.placement.explain import Placed
from controller.placement.place import Outcome, place
from controller.placement.policies import Policy
from controller.placement.snapshot import Demand, FleetSnapshot, Reuse, Reused
from controller.request_metrics import RequestObserver
from controller.timeline import OpenStage
from kv_transfer.keys import split_keys
from pdserve.errors import PdserveError, PromptTooLong


@dataclass(frozen=True, slots=True)
class PlacementSettings:
    policy_name: str
    policy: Policy
    transport: str  # empty = the best common one
    reserve_answer_s: float = 5.0  # then the next candidate is asked


@dataclass(frozen=True, slots=True)
class Placing:
    """What becomes of a group that was tried: it goes to the picked workers, or its request fails."""

    dispatch: Callable[[Waiting[Group], Pick, int], None]  # with the attempt's number
    fail: Callable[[LiveRequest, PdserveError], None]


class _Reusable(NamedTuple):
    """The fields of Demand that say what of a prompt need not be computed."""

    reuse: Mapping[str, Reuse] = MappingProxyType({})
    reused: Reused = "prefix"
    recomputed_tokens: int = 0


class _Blended(NamedTuple):
    """What a request asks, and what was found for exactly that; None: engines compute its prompt whole."""

    asked: KvBlend
    identity: bytes
    layers: int
    remembered: RememberedReuse | None


class WaitingRoom:
    def __init__(
        self,
        fleet: Fleet,
        queue: WaitingQueue[Group],
        settings: PlacementSettings,
        observer: RequestObserver,
        rng: Random,
    ) -> None:
        self._fleet = fleet
        self._queue = queue
        self._settings = settings
        self._observer = observer
        self._rng = rng
        self._stages: dict[LiveRequest, dict[Waiting[Group], OpenStage]] = {}
        self._blended: dict[LiveRequest, _Blended] = {}
        self._placing = False
        self._again = False

    def enter(self, group: Group, now: float, *, retry: bool) -> Waiting[Group]:
        request = group.live.request
        entry = Waiting(group, request.priority, retry, now, request.route, apart=group.live.deaths > 0)
        self.enter_again(entry, now)
        return entry

    def enter_again(self, entry: Waiting[Group], now: float) -> None:
        """Back to its old place: nothing of it has run."""
        self._queue.enter(entry)
        live = entry.item.live
        self._stages.setdefault(live, {})[entry] = live.timeline.begin("queue", 0, "", now)

    def refusal(self, entry: Waiting[Group]) -> PdserveError | None:
        """The error for a new request that could not be placed at once while the queue is full."""
        return self._queue.full() if self._queue.over_limit and self._queue.holds(entry) else None

    def dismiss(self, live: LiveRequest, now: float) -> None:
        """The request has ended."""
        for entry in list(self._stages.get(live, ())):
            self._queue.leave(entry)
            self._close_stage(entry, 0, now)

    def expired(self, now: float, absent_since_s: float | None) -> list[tuple[LiveRequest, PdserveError]]:
        return [(entry.item.live, error) for entry, error in self._queue.expired(now, absent_since_s)]

    def place_waiting(self, now: float, placing: Placing, changed_worker: str = "") -> None:
        """Tries those whose turn it is. What placing leads to may call this again: then one more round follows."""
        if not len(self._queue):
            return
        if changed_worker:
            for entry in self._queue.entries():
                entry.refused_now.discard(changed_worker)
        self._again = True
        if self._placing:
            return
        self._placing = True
        try:
            while self._again:
                self._again = False
                self._round(now, placing)
        finally:
            self._placing = False

    def _round(self, now: float, placing: Placing) -> None:
        for entry in self._queue.candidates():
            if not self._queue.holds(entry):
                continue  # its request failed with one before it
            live, demand, snapshot = entry.item.live, self._demand(entry), self._fleet.snapshot()
            outcome = place(snapshot, demand, self._settings.policy, self._rng)
            attempt = live.next_attempt() if outcome.pick is not None else 0
            if outcome.pick is not None or outcome.shortage != entry.short:
                told = self._with_reuse(entry, demand) if demand.route is not None else demand
                self._note(live, Placed(snapshot, told, self._settings.policy_name, self._settings.policy,
                                        outcome, attempt, now - live.timeline.arrived_s))  # fmt: skip
            self._carry_out(entry, outcome, attempt, now, placing)

    def _carry_out(self, entry: Waiting[Group], outcome: Outcome, attempt: int, now: float, placing: Placing) -> None:
        if outcome.pick is not None:
            self._queue.leave(entry)
            entry.short = None
            self._close_stage(entry, attempt, now)
            placing.dispatch(entry, outcome.pick, attempt)
        elif outcome.shortage == "too_long":
            placing.fail(entry.item.live, _too_long(self._fleet.snapshot(), self._demand(entry)))
        elif outcome.shortage is not None:
            note_shortage(entry, outcome.shortage, now)

    def _note(self, live: LiveRequest, placed: Placed) -> None:
        live.timeline.placed(placed)
        self._observer.decided(placed.policy_name, placed.outcome.reason)

    def _demand(self, entry: Waiting[Group]) -> Demand:
        live, choices = entry.item.live, entry.item.choices
        request = live.request
        demand = Demand(
            tokens=request.prompt_tokens + len(live.outputs[choices[0]].token_ids),
            limit_tokens=request.prompt_tokens + request.sampling.max_tokens,
            choices=len(choices),
            transport=(request.route.transport if request.route else "") or self._settings.transport,
            route=request.route,
            refused_now=frozenset(entry.refused_now),
            bad_pairs=frozenset(live.bad_pairs),
            suspect=live.deaths > 0,
        )
        # Placement scores nobody for a forced route, and tries all that wait for one at every report: it is looked up when told.
        return demand if request.route is not None else self._with_reuse(entry, demand)

    def _with_reuse(self, entry: Waiting[Group], demand: Demand) -> Demand:
        reuse, reused, recomputed = self._reuse(entry.item.live, entry.item.choices[0])
        return replace(demand, reuse=reuse, reused=reused, recomputed_tokens=recomputed)

    def _reuse(self, live: LiveRequest, choice: int) -> _Reusable:
        identity = self._fleet.identity()
        if not identity or live.lacks_prompt_logprobs:
            return _Reusable()  # what is computed for the log-probabilities of its prompt is not taken from anywhere
        if live.kv_blend is None:
            return _Reusable(self._fleet.reusable(live.block_hashes(identity, live.token_ids(choice))))
        remembered = self._remembered(live, live.kv_blend, identity)
        if remembered is None:
            return _Reusable()  # engines compute it whole
        return _Reusable(self._fleet.chunk_reuse(remembered), "chunks", remembered.demand.recomputed_tokens)

    def _remembered(self, live: LiveRequest, asked: KvBlend, identity: bytes) -> RememberedReuse | None:
        layers, known = self._fleet.layers(), self._blended.get(live)
        if known is None or known.asked is not asked or (known.identity, known.layers) != (identity, layers):
            keys = [[*split_keys(each)] for each in live.chunk_keys(identity)]
            wanted = blend_demand(asked, keys, live.request.prompt_tokens, max(1, layers))
            remembered = RememberedReuse(wanted) if wanted is not None else None
            known = self._blended[live] = _Blended(asked, identity, layers, remembered)
        return known.remembered

    def _close_stage(self, entry: Waiting[Group], attempt: int, now: float) -> None:
        entries = self._stages.get(entry.item.live, {})
        stage = entries.pop(entry, None)
        if stage is not None:
            stage.ended_s, stage.attempt = now, attempt
        if not entries:
            self._stages.pop(entry.item.live, None)
            self._blended.pop(entry.item.live, None)


def _too_long(snapshot: FleetSnapshot, demand: Demand) -> PdserveError:
    ready = [view for view in snapshot.workers if view.ready]
    context = max((view.max_context_tokens for view in ready), default=0)
    pool = max((view.blocks_total * view.block_tokens for view in ready), default=0)
    return PromptTooLong.of(max(demand.limit_tokens, demand.tokens), min(context, pool))
