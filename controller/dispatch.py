"""Owns one dispatch: one attempt of some choices of a request on one worker or on a pair, and what it is a burden of there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from controller.admission import Waiting
from controller.lifecycle import Side
from controller.placement.decision import Pick
from controller.timeline import AttemptNotes, OpenStage
from controller.worker_record import Burden
from pdserve.v1 import worker_pb2

if TYPE_CHECKING:
    from controller.live_request import LiveRequest


@dataclass(frozen=True, slots=True)
class Group:
    """Choices that are dispatched together: they have the same tokens so far."""

    live: LiveRequest
    choices: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Dispatch:
    """
    reserving ---granted---> running ---last choice leaves---> (gone)
        |                       ^
        | refused, unanswered   | local: at once
        v
      (gone, its group is queued again)
    """

    group: Group
    waiting: Waiting[Group]
    attempt: int
    pick: Pick
    work: worker_pb2.Work
    notes: AttemptNotes
    stage: Literal["reserving", "running"]
    answer_by_s: float  # for the answer to Reserve
    clock: OpenStage  # the part that runs now
    open: set[int]  # choices that are not over
    burdens: dict[str, Burden] = field(default_factory=dict)  # by worker, as long as it bears it
    computing: bool = False  # an engine has begun with its prompt

    @property
    def live(self) -> LiveRequest:
        return self.group.live

    @property
    def split(self) -> bool:
        return self.pick.kind == "split"

    def side_of(self, worker_id: str) -> Side:
        if not self.split:
            return "both"
        return "prefill" if worker_id == self.pick.prefill_worker else "decode"


def begin(
    entry: Waiting[Group], attempt: int, pick: Pick, work: worker_pb2.Work, now: float, answer_s: float
) -> Dispatch:
    """Takes its first stage in the request's timeline. answer_s: how long the decode worker of a pair has to answer."""
    group, live = entry.item, entry.item.live
    resumed = len(live.outputs[group.choices[0]].token_ids)
    notes = AttemptNotes(
        attempt, group.choices, pick.kind, pick.prefill_worker, pick.decode_worker, pick.transport, resumed
    )
    live.timeline.dispatched(notes)
    clock = live.timeline.begin("reserve" if pick.kind == "split" else "prefill", attempt, pick.decode_worker, now)
    return Dispatch(group, entry, attempt, pick, work, notes, "reserving", now + answer_s, clock, set(group.choices))


def burdens_of(group: Group, pick: Pick, tokens: int, block_tokens: int) -> dict[str, Burden]:
    choices, suspects = len(group.choices), int(group.live.deaths > 0)
    blocks = -(-tokens // block_tokens) + choices - 1
    if pick.kind != "split":
        return {pick.decode_worker: Burden(tokens, choices, blocks, suspects)}
    return {
        pick.prefill_worker: Burden(prefill_tokens=tokens, suspects=suspects),
        pick.decode_worker: Burden(0, choices, blocks),
    }
