"""Owns choosing TCP ports before the processes that listen on them start."""

from __future__ import annotations

import socket


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
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.bind((host.strip("[]"), 0))
        port: int = probe.getsockname()[1]
    return port
