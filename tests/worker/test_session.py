"""The session hub without gRPC: what a stream is given, what a lost or full session leads to, snapshots of KV events."""

from __future__ import annotations

import pytest

from pdserve.errors import Overloaded, Unavailable
from pdserve.v1 import worker_pb2
from worker_runtime.kv_index import HASHES_PER_EVENT, KvIndex
from worker_runtime.session import ASIDES_HELD, KV_BYTES_HELD, SessionHub, SessionStream

BUFFER_BYTES = 4096


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def open_hub(clock: Clock | None = None) -> SessionHub:
    return SessionHub(30.0, BUFFER_BYTES, KvIndex(), worker_pb2.LoadReport, clock or Clock())


def failure(message: str = "x") -> worker_pb2.SessionResponse:
    return worker_pb2.SessionResponse(failed=worker_pb2.DispatchFailed(message=message))


def sequences(hub: SessionHub, stream: SessionStream) -> list[int]:
    return [response.sequence for response in hub.drain(stream) if response.sequence]


async def test_a_stream_gets_each_event_once_and_a_new_stream_what_was_not_acknowledged() -> None:
    hub = open_hub()
    first = hub.attach("c0")
    for _ in range(3):
        hub.report("c0", failure())
    assert sequences(hub, first) == [1, 2, 3]
    assert sequences(hub, first) == []
    hub.acknowledge("c0", 2)
    hub.detach(first)
    hub.report("c0", failure())
    assert sequences(hub, hub.attach("c0")) == [3, 4]


async def test_a_second_stream_of_a_controller_ends_the_first() -> None:
    hub = open_hub()
    first = hub.attach("c0")
    second = hub.attach("c0")
    assert isinstance(first.error, Unavailable)
    hub.detach(first)
    assert hub.is_open("c0")
    assert second.error is None


async def test_a_session_without_a_stream_is_gone_when_its_time_is_over_and_numbers_go_on_after_it() -> None:
    clock = Clock()
    hub = open_hub(clock)
    stream = hub.attach("c0")
    hub.report("c0", failure())
    hub.detach(stream)
    clock.now = 29.0
    assert hub.expired() == []
    clock.now = 30.0
    assert hub.expired() == ["c0"]
    assert hub.expired() == []
    assert hub.report("c0", failure()) == 0
    again = hub.attach("c0")
    assert hub.report("c0", failure()) == 2
    assert sequences(hub, again) == [2]


async def test_a_full_buffer_ends_the_session_and_nobody_attaches_before_its_dispatches_are_cancelled() -> None:
    hub = open_hub()
    stream = hub.attach("c0")
    assert hub.report("c0", failure("x" * 3000)) == 1
    assert hub.report("c0", failure("x" * 3000)) == 0
    assert isinstance(stream.error, Overloaded)
    with pytest.raises(Unavailable):
        hub.attach("c0")
    assert hub.expired() == ["c0"]
    assert sequences(hub, hub.attach("c0")) == []


async def test_a_load_comes_with_every_heartbeat_and_only_the_last_one_waits() -> None:
    hub = open_hub()
    stream = hub.attach("c0")
    hub.heartbeat()
    hub.heartbeat()
    assert [response.WhichOneof("event") for response in hub.drain(stream)].count("load") == 1
    assert list(hub.drain(stream)) == []


async def test_a_controller_that_reads_no_kv_events_gets_a_snapshot_in_their_place() -> None:
    hub = open_hub()
    hub.kv_stored(b"a" * 32)
    stream = hub.attach("c0")
    kv = [response.kv for response in hub.drain(stream) if response.WhichOneof("event") == "kv"]
    assert [event.kind for message in kv for event in message.events] == [
        worker_pb2.KvEvent.KIND_CLEARED,
        worker_pb2.KvEvent.KIND_STORED,
    ]
    block_hashes = b"".join(number.to_bytes(32, "big") for number in range(KV_BYTES_HELD // 32 + 1))
    hub.kv_stored(block_hashes)
    hub.kv_evicted(b"a" * 32)
    late = [response.kv for response in hub.drain(stream) if response.WhichOneof("event") == "kv"]
    events = [event for message in late for event in message.events]
    assert events[0].kind == worker_pb2.KvEvent.KIND_CLEARED
    assert b"".join(event.block_hashes for event in events[1:]) == block_hashes
    assert all(len(event.block_hashes) <= 32 * HASHES_PER_EVENT for event in events)
    assert late[0].first_sequence == kv[-1].first_sequence + len(kv[-1].events)


async def test_what_is_told_aside_is_not_numbered_not_replayed_and_bounded() -> None:
    hub = open_hub()
    hub.tell("c0", failure("before any session"))
    stream = hub.attach("c0")
    for number in range(ASIDES_HELD + 3):
        hub.tell("c0", failure(str(number)))
    told = [response for response in hub.drain(stream) if response.WhichOneof("event") == "failed"]
    assert [response.failed.message for response in told] == [str(number) for number in range(3, ASIDES_HELD + 3)]
    assert all(response.sequence == 0 for response in told)
    hub.tell("c0", failure("late"))
    again = hub.attach("c0")
    assert not [response for response in hub.drain(again) if response.WhichOneof("event") == "failed"]
