"""Owns what each session command does: new work goes to the roles, the rest is the node's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pdserve.errors import InvalidRequest, NotFound
from pdserve.v1 import worker_pb2
from service_kit.logs import get_logger
from worker_runtime.dispatches import DispatchRecord, cancel_choices
from worker_runtime.holding import RoleName, roles_from_proto
from worker_runtime.messages import choices_of, dispatch_from_proto
from worker_runtime.roles import CommandHandler, RoleContext
from worker_runtime.session import SessionHub

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class NodeControl:
    """What commands may ask of the node itself."""

    set_roles: Callable[[frozenset[RoleName]], None]
    drain: Callable[[float, Callable[[], None]], None]  # deadline_s, called when drained
    kv_command: Callable[[worker_pb2.KvCommand, Callable[[worker_pb2.CommandResult], None]], None]  # called when done


class CommandRouter:
    def __init__(
        self,
        context: RoleContext,
        hub: SessionHub,
        roles: Mapping[str, CommandHandler],
        control: NodeControl,
        clock: Callable[[], float],
    ) -> None:
        self._context = context
        self._hub = hub
        self._control = control
        self._clock = clock
        self._handlers: dict[str, CommandHandler] = {
            **roles,
            "cancel": self._cancel,
            "ack": self._ack,
            "set_roles": self._set_roles,
            "drain": self._drain,
            "adopt": self._adopt,
            "kv_snapshot": self._kv_snapshot,
            "kv_command": self._kv_command,
        }

    def handle(self, controller_id: str, request: worker_pb2.SessionRequest) -> None:
        """Raises InvalidRequest for what no controller of ours sends: it ends the stream, not the session."""
        command = request.WhichOneof("command")
        handler = self._handlers.get(command or "")
        if handler is None:
            raise InvalidRequest(f"Command {command!r} is unknown or out of place here.", param="command")
        handler(controller_id, request)

    def cancel_all_of(self, controller_id: str) -> None:
        """The controller is gone for good."""
        for record in self._context.dispatches.owned_by(controller_id):
            self._bury(record)

    def _cancel(self, controller_id: str, request: worker_pb2.SessionRequest) -> None:
        dispatch = dispatch_from_proto(request.cancel.dispatch)
        table = self._context.dispatches
        record = table.get(dispatch)
        if record is None:
            table.bury(dispatch, self._clock())  # its work may still be on the way
            return
        if not self._may_command(controller_id, record):
            return
        stopped = cancel_choices(record, choices_of(request.cancel.choices))
        if record.tokens_ended:
            self._bury(record)
        elif stopped:
            self._context.entrance.cancel_choices(dispatch, stopped)

    def _bury(self, record: DispatchRecord) -> None:
        ended = record.ended
        cancel_choices(record, ())
        self._context.dispatches.bury(record.work.dispatch, self._clock())
        if not ended:
            record.handler.cancel()

    def _may_command(self, controller_id: str, record: DispatchRecord) -> bool:
        """Its owner, or anybody while the owner has no session."""
        return record.owner == controller_id or not self._hub.is_open(record.owner)

    def _ack(self, controller_id: str, request: worker_pb2.SessionRequest) -> None:
        self._hub.acknowledge(controller_id, request.ack.sequence)
        self._context.dispatches.acknowledged(controller_id, request.ack.sequence, self._clock())

    def _kv_snapshot(self, controller_id: str, request: worker_pb2.SessionRequest) -> None:
        self._hub.kv_snapshot(controller_id)

    def _kv_command(self, controller_id: str, request: worker_pb2.SessionRequest) -> None:
        def reply(result: worker_pb2.CommandResult) -> None:
            self._hub.tell(controller_id, worker_pb2.SessionResponse(result=result))

        self._control.kv_command(request.kv_command, reply)

    def _set_roles(self, controller_id: str, request: worker_pb2.SessionRequest) -> None:
        self._control.set_roles(roles_from_proto(request.set_roles.roles))
        log.info("roles_set", roles=sorted(self._context.holding.roles), controller_id=controller_id)
        self._result(controller_id, request.set_roles.command_id)

    def _drain(self, controller_id: str, request: worker_pb2.SessionRequest) -> None:
        command_id = request.drain.command_id
        self._control.drain(request.drain.deadline_ms / 1000, lambda: self._result(controller_id, command_id))

    def _result(self, controller_id: str, command_id: int) -> None:
        result = worker_pb2.CommandResult(command_id=command_id)
        self._hub.report(controller_id, worker_pb2.SessionResponse(result=result))

    def _adopt(self, controller_id: str, request: worker_pb2.SessionRequest) -> None:
        adopt = request.adopt
        dispatch = dispatch_from_proto(adopt.dispatch)
        if len(adopt.choices) != len(adopt.next_index):
            raise InvalidRequest("Adopt needs one next_index per choice.", param="next_index")
        record = self._context.dispatches.get(dispatch)
        if record is None or not self._may_command(controller_id, record):
            error = NotFound("This worker holds no orphaned dispatch of that name.")
            self._context.reports.refuse(controller_id, dispatch, error)
            return
        wanted = dict(zip(choices_of(adopt.choices), adopt.next_index, strict=True))
        if not wanted.keys() <= record.choices.keys():
            raise InvalidRequest("Adopt names a choice that the dispatch does not have.", param="choices")
        record.owner = controller_id
        log.info("dispatch_adopted", request_id=record.work.request_id, controller_id=controller_id)
        self._context.reports.replay_tokens(record, wanted)
