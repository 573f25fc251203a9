"""Owns what a worker is started as: its id, roles, configuration and incarnation."""

from __future__ import annotations

import time
from dataclasses import dataclass

from service_kit.config import ClusterConfig
from worker_runtime.holding import RoleName


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """incarnation: larger at each start of the same worker, by default the wall clock in ns: its issuer needs no state."""

    worker_id: str
    roles: frozenset[RoleName]
    config: ClusterConfig
    version: str
    incarnation: int


def new_incarnation() -> int:
    return time.time_ns()
