"""Which peers the nixl transport refuses; without the library."""

from __future__ import annotations

import os

import pytest

from kv_transfer.transports import open_transport
from kv_transfer.transports.nixl_reach import address_of, can_read
from pdserve.errors import ConfigInvalid
from service_kit.config import TransferConfig


def test_memory_that_says_what_its_owner_said_can_be_read() -> None:
    memory = bytearray(b"who I am")
    assert can_read(os.getpid(), address_of(memory), b"who I am")


@pytest.mark.parametrize("pid", [os.getpid(), 2**22 + 1], ids=["another page", "nobody"])
def test_a_process_that_is_not_where_it_says_cannot_be_read(pid: int) -> None:
    assert not can_read(pid, 8, b"who I am")


def test_other_bytes_at_the_address_are_another_process() -> None:
    memory = bytearray(b"somebody")
    assert not can_read(os.getpid(), address_of(memory), b"who I am")


def test_over_tcp_nixl_is_refused_because_a_lost_peer_would_end_the_process() -> None:
    with pytest.raises(ConfigInvalid, match=r"transfer\.profile"):
        open_transport("nixl", TransferConfig(profile="tcp"), "127.0.0.1")
