"""Ports that are chosen before their listener starts."""

from __future__ import annotations

import socket
from pathlib import Path

from service_kit.ports import choose_port


def test_a_wanted_port_that_is_free_is_taken() -> None:
    port = choose_port("127.0.0.1", 0)
    assert choose_port("127.0.0.1", port) == port


def test_a_port_in_use_or_taken_is_replaced_by_a_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        used = listener.getsockname()[1]
        assert choose_port("127.0.0.1", used) != used
    free = choose_port("127.0.0.1", 0)
    assert choose_port("127.0.0.1", free, frozenset([free])) != free


def test_a_chosen_port_is_none_that_an_outgoing_connection_may_get() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(choose_port("127.0.0.1", 0) < first for _ in range(50))
