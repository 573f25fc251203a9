"""The session hub without gRPC: what a stream is given, what a lost or full session leads to, snapshots of KV events."""

from __future__ import annotations

import asyncio

import pytest

from pdserve.errors import Overloaded, Unavailable
from pdserve.v1 import worker_pb2
from worker_runtime.kv_event_queue import KvEventQueue
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


def kv_messages(hub: SessionHub, stream: SessionStream) -> list[worker_pb2.KvEvents]:
    return [response.kv for response in hub.drain(stream) if response.WhichOneof("event") == "kv"]


async def kv_messages_in_time(hub: SessionHub, stream: SessionStream) -> list[worker_pb2.KvEvents]:
    """What comes first although nothing else happens."""
    async with asyncio.timeout(10):
        while not (messages := kv_messages(hub, stream)):
            await stream.wait()
    return messages


async def test_kv_events_leave_together_after_a_while_and_not_with_what_else_leaves_before() -> None:
    hub = open_hub()
    stream = hub.attach("c0")
    opening = kv_messages(hub, stream)
    hub.kv_stored(b"a" * 32)
    hub.kv_stored(b"b" * 32)
    hub.kv_stored(b"b" * 32, "host")
    hub.kv_evicted(b"a" * 32)
    hub.heartbeat()
    assert [response.WhichOneof("event") for response in hub.drain(stream)] == ["load"]
    (message,) = await kv_messages_in_time(hub, stream)
    assert [(event.kind, event.tier, event.block_hashes) for event in message.events] == [
        (worker_pb2.KvEvent.KIND_STORED, "device", b"a" * 32 + b"b" * 32),
        (worker_pb2.KvEvent.KIND_STORED, "host", b"b" * 32),
        (worker_pb2.KvEvent.KIND_EVICTED, "device", b"a" * 32),
    ]
    assert message.first_sequence == opening[-1].first_sequence + len(opening[-1].events)
    hub.kv_evicted(b"b" * 32)
    (later,) = await kv_messages_in_time(hub, stream)
    assert later.first_sequence == message.first_sequence + 3


async def test_a_snapshot_takes_the_place_of_kv_events_that_wait() -> None:
    hub = open_hub()
    stream = hub.attach("c0")
    kv_messages(hub, stream)
    hub.kv_stored(b"a" * 32)
    hub.kv_snapshot("c0")
    told = [event.block_hashes for message in kv_messages(hub, stream) for event in message.events]
    assert told == [b"", b"a" * 32]
    hub.kv_stored(b"b" * 32)
    (message,) = await kv_messages_in_time(hub, stream)
    assert [event.block_hashes for event in message.events] == [b"b" * 32]


async def test_a_stream_that_is_closed_has_no_kv_events_left_that_would_wake_it() -> None:
    hub = open_hub()
    stream = hub.attach("c0")
    kv_messages(hub, stream)
    hub.kv_stored(b"a" * 32)
    hub.detach(stream)
    assert not stream.kv_events
    assert kv_messages(hub, stream) == []
    again = hub.attach("c0")
    hub.kv_stored(b"b" * 32)
    told = [event.block_hashes for message in kv_messages(hub, again) for event in message.events]
    assert told == [b"", b"a" * 32 + b"b" * 32]


def test_merged_kv_events_stay_within_the_bound_of_one() -> None:
    queue = KvEventQueue()
    piece = b"a" * (32 * (HASHES_PER_EVENT // 2 + 1))
    for _ in range(3):
        queue.add(worker_pb2.KvEvent.KIND_STORED, piece, "host")
    queue.add(worker_pb2.KvEvent.KIND_STORED, b"b" * 32, "host")
    assert queue.size_bytes == 3 * len(piece) + 32
    assert [event.block_hashes for event in queue.take()] == [piece, piece, piece + b"b" * 32]
    assert not queue
    assert queue.take() == []


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
