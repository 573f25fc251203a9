"""Owns the claims of clusters on cores of this machine, so that two of them never bind engines to the same one.

A claim is an abstract Unix socket: the kernel ends it with the process that holds it, and it leaves no file behind. Clusters that
claim at the same instant may each get too few, and then none of them binds; that is slower, never wrong.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterable
from pathlib import Path

from service_kit.core_binding import MachineCores, service_cores

NAME = "pdserve-core"
TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


class CoreClaims:
    """The claims of this process."""

    def __init__(self, name: str = NAME) -> None:
        self._name = name
        self._held: dict[int, socket.socket] = {}

    def take(self, cores: Iterable[int]) -> frozenset[int]:
        """Claims those of `cores` that nobody holds. Returns what is held now."""
        for core in cores:
            if core not in self._held:
                self._claim(core)
        return frozenset(self._held)

    def keep(self, cores: Collection[int]) -> None:
        """Gives up every claim but those on `cores`."""
        for core in [core for core in self._held if core not in cores]:
            self._held.pop(core).close()

    def _claim(self, core: int) -> None:
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0{self._name}-{core}")
        except OSError:  # held by another, or sockets of this kind are forbidden here: either way it is not ours
            claim.close()
        else:
            self._held[core] = claim


def allowed_cores() -> tuple[int, ...]:
    return tuple(sorted(os.sched_getaffinity(0)))


def own_service_cores(setting: str) -> tuple[int, ...]:
    """What pool.service_cores says to one process that does not know the others; none: anywhere. Raises ConfigInvalid."""
    return service_cores(setting, (), allowed_cores())


def machine_cores(free: frozenset[int]) -> MachineCores:
    """free: those of the allowed cores that no other cluster holds."""
    allowed = allowed_cores()
    return MachineCores(allowed, free, {core: _physical(core) for core in allowed})


def _physical(core: int) -> int:
    try:
        siblings = Path(TOPOLOGY.format(core)).read_text()
    except OSError:  # not every container shows it
        return core
    return int(siblings.replace("-", ",").split(",")[0])
