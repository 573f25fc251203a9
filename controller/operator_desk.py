"""Owns what operators may see and do: implements `controller.operations.Operations` over the fleet and the service."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from controller.blend_gate import BlendGate
from controller.fleet import Fleet
from controller.kv_desk import KvDesk
from controller.operations import ClusterStatus, RequestSummary, RequestTimeline, RoleName, WorkerStatus
from controller.service import ControllerService
from controller.worker_commands import WorkerCommands
from pdserve.errors import InvalidRequest, NotFound
from pdserve.v1 import types_pb2

_ROLES: dict[RoleName, types_pb2.Role.ValueType] = {
    "prefill": types_pb2.ROLE_PREFILL,
    "decode": types_pb2.ROLE_DECODE,
}


@dataclass(slots=True)
class Identity:
    """Who this controller is; the addresses are known once the sockets are bound."""

    controller_id: str
    model: str
    version: str
    api_url: str = ""
    grpc_address: str = ""


class OperatorDesk:
    def __init__(
        self,
        fleet: Fleet,
        service: ControllerService,
        identity: Identity,
        blends: BlendGate,
        worker_drain_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._commands = WorkerCommands(fleet, clock)
        self.kv = KvDesk(fleet, self._commands)
        self.blends = blends
        self._fleet = fleet
        self._service = service
        self._identity = identity
        self._worker_drain_s = worker_drain_s
        self._clock = clock
        self._started_s = clock()

    def status(self) -> ClusterStatus:
        now, identity = self._clock(), self._identity
        records = sorted(self._fleet.records(), key=lambda record: record.worker_id)
        return ClusterStatus(
            api_url=identity.api_url,
            grpc_address=identity.grpc_address,
            controller_id=identity.controller_id,
            pid=os.getpid(),
            model=identity.model,
            version=identity.version,
            uptime_s=now - self._started_s,
            draining=self._service.draining,
            queued=self._service.queued,
            live_requests=self._service.live_requests,
            workers=tuple(record.status(now) for record in records),
            kv_blend=self.blends.status(),
        )

    def requests(self, limit: int) -> tuple[RequestSummary, ...]:
        now = self._clock()
        return tuple(timeline.summary(now) for timeline in self._service.timelines.newest(limit))

    def request(self, request_id: str) -> RequestTimeline | None:
        timeline = self._service.timelines.get(request_id)
        return timeline.view(self._clock()) if timeline is not None else None

    async def set_roles(self, worker_id: str, roles: tuple[RoleName, ...]) -> WorkerStatus:
        if not roles:
            raise InvalidRequest("A worker holds at least one role.", param="roles")
        await self._commands.set_roles(worker_id, [_ROLES[role] for role in roles])
        self._service.changed(worker_id)
        return self._worker(worker_id)

    async def drain(self, worker_id: str) -> WorkerStatus:
        self._commands.drain(worker_id, self._worker_drain_s)
        return self._worker(worker_id)

    def _worker(self, worker_id: str) -> WorkerStatus:
        record = self._fleet.record(worker_id)
        if record is None:
            raise NotFound(f"There is no worker {worker_id!r}; `pdserve status` lists them.")
        return record.status(self._clock())
