"""Owns what a worker may take on: the roles that it holds now, whether it drains, and whether it has an engine. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pdserve.errors import InvalidRequest, NoCapacity
from pdserve.v1 import types_pb2

RoleName = Literal["prefill", "decode"]

_PROTO: dict[RoleName, types_pb2.Role.ValueType] = {"prefill": types_pb2.ROLE_PREFILL, "decode": types_pb2.ROLE_DECODE}
_NAMES: dict[types_pb2.Role.ValueType, RoleName] = {number: name for name, number in _PROTO.items()}


class Holding:
    def __init__(self, roles: Iterable[RoleName]) -> None:
        self._roles = frozenset(roles)
        self._draining = False
        self._engine_lost = False

    @property
    def roles(self) -> frozenset[RoleName]:
        return self._roles

    @property
    def draining(self) -> bool:
        """Takes nothing any more."""
        return self._draining or self._engine_lost

    def set_roles(self, roles: Iterable[RoleName]) -> None:
        self._roles = frozenset(roles)

    def drain(self) -> None:
        """There is no way back: a drained worker ends."""
        self._draining = True

    def lose_engine(self) -> NoCapacity:
        """What comes from now on is refused, as the answer says: so that nobody thinks that it was here when the engine died."""
        self._engine_lost = True
        return _engine_gone()

    def refusal(self, role: RoleName | None) -> NoCapacity | None:
        """Why work of `role` (None: of any role) is not taken; the controller tries another worker."""
        if self._engine_lost:
            return _engine_gone()
        if self._draining:
            return NoCapacity("This worker is draining.")
        if role is not None and role not in self._roles:
            return NoCapacity(f"This worker does not hold the role {role}.")
        return None

    def to_proto(self) -> list[types_pb2.Role.ValueType]:
        return [_PROTO[role] for role in sorted(self._roles)]


def _engine_gone() -> NoCapacity:
    return NoCapacity("This worker's engine is gone.")


def roles_from_proto(roles: Iterable[types_pb2.Role.ValueType]) -> frozenset[RoleName]:
    """Raises InvalidRequest where a role is unknown or none is left."""
    try:
        names = frozenset(_NAMES[role] for role in roles)
    except KeyError as error:
        raise InvalidRequest(f"Role {error} is unknown to this worker.", param="roles") from error
    if not names:
        raise InvalidRequest("A worker holds at least one role.", param="roles")
    return names
