"""Owns choosing TCP ports before the processes that listen on them start."""

from __future__ import annotations

import random
import socket
from pathlib import Path

# Below the ports that the system gives to outgoing connections, so that none of them takes a chosen one before its listener.
_LOWEST = 15_000
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_ATTEMPTS = 200


def choose_port(host: str, wanted: int, taken: frozenset[int] = frozenset()) -> int:
    """`wanted` if it can be bound now, else a free one. 0 = any. Never one of `taken`."""
    if wanted and wanted not in taken and _can_bind(host, wanted):
        return wanted
    while (port := _free_port(host)) in taken:
        continue
    return port


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _can_bind(host: str, port: int) -> bool:
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections in TIME_WAIT do not hold a port
        try:
            probe.bind((host.strip("[]"), port))
        except OSError:
            return False
    return True


def _free_port(host: str) -> int:
    for port in random.sample(range(_LOWEST, _first_ephemeral()), _ATTEMPTS):
        if _can_bind(host, port):
            return port
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.bind((host.strip("[]"), 0))
        given: int = probe.getsockname()[1]
    return given


def _first_ephemeral() -> int:
    first = int(_EPHEMERAL.read_text().split()[0]) if _EPHEMERAL.exists() else 32_768
    return max(first, _LOWEST + _ATTEMPTS)
