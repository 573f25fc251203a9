"""Owns what a role is to the node: commands it answers, its batching policy, and the context it is built with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from engine.protocol import Dispatch, SetPolicy, Work
from pdserve.errors import Cancelled, PdserveError
from pdserve.v1 import worker_pb2
from service_kit.config import ClusterConfig
from worker_runtime.dispatches import DispatchTable
from worker_runtime.engine_link import EngineLink
from worker_runtime.holding import Holding, RoleName
from worker_runtime.kv_endpoint import KvEndpoint
from worker_runtime.load import LoadBoard
from worker_runtime.messages import work_from_proto
from worker_runtime.reports import DispatchReports
from worker_runtime.task_owner import TaskOwner
from worker_runtime.work_entrance import WorkEntrance

CommandHandler = Callable[[str, worker_pb2.SessionRequest], None]  # controller_id, command


@dataclass(frozen=True, slots=True)
class RoleContext:
    """Everything a role works with; all of it belongs to one node."""

    config: ClusterConfig
    engine: EngineLink
    entrance: WorkEntrance
    kv: KvEndpoint
    dispatches: DispatchTable
    reports: DispatchReports
    holding: Holding
    load: LoadBoard
    tasks: TaskOwner


class RoleService(Protocol):
    """One role over the engine. It exists whether the role is held or not: admission asks `Holding`."""

    @property
    def role(self) -> RoleName: ...

    def commands(self) -> Mapping[str, CommandHandler]:
        """By name of the field in SessionRequest.command."""

    def policy(self) -> SetPolicy:
        """The batching policy of a worker that holds this role alone."""


RoleFactory = Callable[[RoleContext], RoleService]


def combined_policy(policies: Iterable[SetPolicy]) -> SetPolicy:
    """Policy of a worker that holds several roles: the largest batches, the smallest chunks, the most head-room.

    Chunks bound what a prompt adds to the steps of running decodes; 0 (whole prompts) is the largest chunk.
    """
    held = list(policies)
    chunks = [policy.prefill_chunk for policy in held if policy.prefill_chunk]
    return SetPolicy(
        token_budget=max(policy.token_budget for policy in held),
        max_running=max(policy.max_running for policy in held),
        prefill_chunk=min(chunks, default=0),
        decode_headroom_blocks=max(policy.decode_headroom_blocks for policy in held),
    )


def live_sequences(dispatches: DispatchTable) -> int:
    """Choices that this worker computes, keeps waiting or holds blocks for."""
    return sum(len(record.choices) for record in dispatches.live())


def take_work(
    dispatches: DispatchTable,
    controller_id: str,
    message: worker_pb2.Work,
    admit: Callable[[Work], PdserveError | None],
    refuse: Callable[[str, Dispatch, PdserveError], object],
) -> Work | None:
    """The work that a command brings, if it may have an effect: it is new, was not cancelled before it came, and `admit`
    has no objection. Else the answer was given; a duplicate needs none. Raises InvalidRequest where it is malformed."""
    work = work_from_proto(message)
    error: PdserveError | None
    match dispatches.arrival(work.dispatch):
        case "known":
            return None
        case "buried":
            error = Cancelled("This dispatch was cancelled or has ended.")
        case "new":
            error = admit(work)
    if error is None:
        return work
    refuse(controller_id, work.dispatch, error)
    return None
