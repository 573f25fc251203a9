"""Owns one dispatch: one attempt of some choices of a request on one worker or on a pair, and its command's content."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from controller.admission import Waiting
from controller.kv_blend import put_blend
from controller.lifecycle import Side
from controller.placement.decision import Pick
from controller.timeline import AttemptNotes, OpenStage
from controller.work_messages import dispatch_id, sampling_params
from controller.worker_record import Burden
from kv_transfer.keys import tenant_digest
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


def work_of(group: Group, attempt: int, identity: bytes) -> worker_pb2.Work:
    live, first = group.live, group.choices[0]
    token_ids = live.token_ids(first)
    sampling = sampling_params(live.request.sampling)
    if not live.lacks_prompt_logprobs:
        sampling.ClearField("prompt_logprobs")
    work = worker_pb2.Work(
        dispatch=dispatch_id(live.key, attempt),
        request_id=live.request.request_id,
        choices=group.choices,
        token_ids=token_ids,
        prompt_tokens=live.request.prompt_tokens,
        sampling=sampling,
        block_hashes=live.block_hashes(identity, token_ids),
        priority=live.request.priority,
        tenant=tenant_digest(live.request.cache_salt),
    )
    if live.kv_blend is not None:
        put_blend(work, live.kv_blend, identity, live.request.cache_salt)
    return work


def burdens_of(group: Group, pick: Pick, tokens: int, block_tokens: int) -> dict[str, Burden]:
    choices, suspects = len(group.choices), int(group.live.deaths > 0)
    blocks = -(-tokens // block_tokens) + choices - 1
    if pick.kind != "split":
        return {pick.decode_worker: Burden(tokens, choices, blocks, suspects)}
    return {
        pick.prefill_worker: Burden(prefill_tokens=tokens, suspects=suspects),
        pick.decode_worker: Burden(0, choices, blocks),
    }
