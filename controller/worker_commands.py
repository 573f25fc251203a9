"""Owns what operators have workers do: roles, looks at their tiers, drains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from controller.fleet import Fleet
from controller.worker_record import WorkerRecord
from pdserve.errors import NotFound, Unavailable
from pdserve.v1 import types_pb2, worker_pb2


class WorkerCommands:
    """All raise NotFound for a worker that is not known, Unavailable for one without a session, and what the worker answers."""

    def __init__(self, fleet: Fleet, clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._clock = clock

    async def set_roles(self, worker_id: str, roles: Sequence[types_pb2.Role.ValueType]) -> None:
        """Returns when the worker has done it."""
        record, pending = self._commandable(worker_id), self._fleet.commands
        command_id = pending.expect(worker_id)
        command = worker_pb2.SetRoles(command_id=command_id, roles=roles)
        self._fleet.send(worker_id, worker_pb2.SessionRequest(set_roles=command))
        await pending.answer(command_id)
        record.load.ClearField("roles")
        record.load.roles.extend(roles)
        record.report(record.load, self._clock())

    async def inspect(self, worker_id: str, command: worker_pb2.KvCommand) -> worker_pb2.KvAnswer:
        """Has a worker look at its tiers, or steer them."""
        self._commandable(worker_id)
        command.command_id = self._fleet.commands.expect(worker_id)
        self._fleet.send(worker_id, worker_pb2.SessionRequest(kv_command=command))
        return (await self._fleet.commands.answer(command.command_id)).kv

    def drain(self, worker_id: str, deadline_s: float) -> None:
        """From now on it gets no work; it ends by itself when what it has is done."""
        record = self._commandable(worker_id)
        command = worker_pb2.Drain(command_id=self._fleet.commands.next_id(), deadline_ms=round(deadline_s * 1000))
        self._fleet.send(worker_id, worker_pb2.SessionRequest(drain=command))
        self._fleet.drain_ordered(record)

    def _commandable(self, worker_id: str) -> WorkerRecord:
        record = self._fleet.record(worker_id)
        if record is None:
            raise NotFound(f"There is no worker {worker_id!r}; `pdserve status` lists them.")
        if record.session is None or record.member.state not in ("READY", "DRAINING"):
            raise Unavailable(f"Worker {worker_id} is {record.member.state}.", retry_after_s=1.0)
        return record
