"""Owns the full account of a placement: every candidate with its terms, every refusal with its text. Pure.

Placement is a pure function of (snapshot, demand, policy), so only those are kept; the account is made when somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from controller.placement.decision import Candidate, CandidateKind, Decision
from controller.placement.filters import (
    common_transport,
    decode_refusal,
    explanation,
    pair_refusal,
    prefill_refusal,
    worker_refusal,
)
from controller.placement.place import Outcome, Scored, alone_refusal, pairs, split_sides
from controller.placement.policies import Policy
from controller.placement.snapshot import Demand, FleetSnapshot, WorkerView

CANDIDATES_LISTED = 200


@dataclass(frozen=True, slots=True)
class Placed:
    """What one placement saw and said. Views are shared between placements, so a thousand of these are small."""

    snapshot: FleetSnapshot
    demand: Demand
    policy_name: str
    policy: Policy
    outcome: Outcome
    attempt: int
    at_s: float

    def decision(self) -> Decision:
        found = list(self._candidates())
        return Decision(
            attempt=self.attempt,
            at_s=self.at_s,
            policy=self.policy_name,
            reason=self.outcome.reason,
            picked=self.outcome.pick,
            candidates=tuple(found[:CANDIDATES_LISTED]),
            candidates_left_out=max(0, len(found) - CANDIDATES_LISTED),
            reused=self.demand.reused,
            recomputed_tokens=self.demand.recomputed_tokens,
        )

    def _candidates(self) -> Iterator[Candidate]:
        """Scored ones first, best first; then the refused."""
        sides = split_sides(self.snapshot, self.demand, self.policy)
        scored = [*pairs(sides, self.demand, self.policy), *sides.local]
        yield from (self._scored(each) for each in sorted(scored, key=lambda each: each.score))
        for view in self.snapshot.workers:
            yield from self._one_sided(view)
        yield from self._unpaired([view for _, view in sides.prefill], [view for _, view in sides.decode])
        if not scored:
            for view in self.snapshot.workers:
                yield self._alone(view)

    def _scored(self, scored: Scored) -> Candidate:
        transport = common_transport(scored.prefill, scored.decode, self.demand) if scored.kind == "split" else ""
        return self._possible(scored.kind, scored.prefill, scored.decode, transport, scored.score)

    def _possible(
        self, kind: CandidateKind, prefill: WorkerView, decode: WorkerView, transport: str, score: float
    ) -> Candidate:
        held = self.demand.reuse_at(prefill)
        return Candidate(
            kind=kind,
            prefill_worker=prefill.worker_id,
            decode_worker=decode.worker_id,
            transport=transport,
            score=score,
            terms=self._terms(prefill, decode),
            refusal="",
            message="",
            device_tokens=held.device_tokens,
            stored_tokens=held.stored_tokens,
            pulled_tokens=held.pulled_tokens,
            peer=held.peer,
        )

    def _terms(self, prefill: WorkerView, decode: WorkerView) -> Mapping[str, float]:
        policy, demand = self.policy, self.demand
        names = (*policy.prefill_names, *policy.decode_names, *policy.joint_names)
        values = (
            *policy.prefill_terms(prefill, demand),
            *policy.decode_terms(decode, demand),
            *policy.joint_terms(prefill, decode, demand),
        )
        return dict(zip(names, values, strict=True))

    def _one_sided(self, view: WorkerView) -> Iterator[Candidate]:
        """The roles for which this worker was refused before pairs were formed."""
        general = worker_refusal(view, self.demand)
        prefill = (general or prefill_refusal(view, self.demand)) if view.prefill else "role_not_held"
        decode = (general or decode_refusal(view, self.demand)) if view.decode else "role_not_held"
        if prefill:
            yield self._refused("split", view.worker_id, "", prefill, view)
        if decode:
            yield self._refused("split", "", view.worker_id, decode, view)

    def _unpaired(self, prefills: list[WorkerView], decodes: list[WorkerView]) -> Iterator[Candidate]:
        refused = (
            self._refused("split", prefill.worker_id, decode.worker_id, reason, decode)
            for prefill in prefills
            for decode in decodes
            if prefill is not decode and (reason := pair_refusal(prefill, decode, self.demand))
        )
        return islice(refused, CANDIDATES_LISTED)

    def _alone(self, view: WorkerView) -> Candidate:
        refusal = alone_refusal(view, self.demand)
        if refusal:
            return self._refused("last_resort", view.worker_id, view.worker_id, refusal, view)
        return self._possible("last_resort", view, view, "", sum(self._terms(view, view).values()))

    def _refused(
        self, kind: CandidateKind, prefill_worker: str, decode_worker: str, reason: str, view: WorkerView
    ) -> Candidate:
        text = explanation(reason, view, self.demand)
        return Candidate(kind, prefill_worker, decode_worker, "", None, {}, reason, text)
