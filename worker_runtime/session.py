"""Owns the sessions with the controllers: per controller the replay buffer and the stream that is open now, if any.

  attach            stream lost              orphan_s later
----------> OPEN --------------> ORPHANED ------------------> gone, its dispatches are cancelled
               ^                    |
               +--- same controller_id opens again: replays what was not acknowledged

KV events wait in their stream for KV_EVENTS_S and leave together: an engine tells every page by itself, and a message each costs
both sides more than what it says.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pdserve.errors import Overloaded, PdserveError, Unavailable
from pdserve.v1 import worker_pb2
from worker_runtime.kv_event_queue import Kind, KvEventQueue
from worker_runtime.kv_index import KvIndex
from worker_runtime.replay import ReplayBuffer, ReplayOverflow

ASIDES_HELD = 32  # of one stream; the oldest go first
KV_EVENTS_S = 0.05  # from the first KV event that waits until all that wait leave
KV_BYTES_HELD = 2**20  # of one stream's KV events; beyond it the controller gets a snapshot instead
PAST_SESSIONS = 1024
DEVICE_TIER = "device"


@dataclass(slots=True)
class ControllerSession:
    controller_id: str
    replay: ReplayBuffer[worker_pb2.SessionResponse]
    stream: SessionStream | None = None
    orphan_deadline: float = 0.0  # where no stream is open
    next_kv_sequence: int = 1


@dataclass(slots=True)
class SessionStream:
    """One open gRPC stream of a session. `drain` gives what is to be written; `wake` says that there is something."""

    session: ControllerSession
    cursor: int  # last sequence that was written to this stream
    load_due: bool = True
    kv_snapshot_due: bool = True
    kv_events: KvEventQueue = field(default_factory=KvEventQueue)
    asides: deque[worker_pb2.SessionResponse] = field(default_factory=lambda: deque(maxlen=ASIDES_HELD))
    error: PdserveError | None = None
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _kv_timer: asyncio.TimerHandle | None = None  # runs while KV events wait that are not due

    def wake(self) -> None:
        self._wake.set()

    async def wait(self) -> None:
        await self._wake.wait()
        self._wake.clear()

    def fail(self, error: PdserveError) -> None:
        self.error = self.error or error
        self._wake.set()

    def close(self) -> None:
        """Nothing is drained from it any more."""
        self._forget_kv_events()

    def add_kv_event(self, kind: Kind, block_hashes: bytes, tier: str) -> None:
        """Events that pile up while the controller reads nothing give way to a snapshot."""
        if self.kv_snapshot_due:
            return
        if not self.kv_events:
            self._kv_timer = asyncio.get_running_loop().call_later(KV_EVENTS_S, self._kv_due)
        self.kv_events.add(kind, block_hashes, tier)
        if self.kv_events.size_bytes > KV_BYTES_HELD:
            self._forget_kv_events()
            self.ask_kv_snapshot()

    def ask_kv_snapshot(self) -> None:
        self.kv_snapshot_due = True
        self._wake.set()

    def take_kv_snapshot(self) -> bool:
        """Whether a snapshot is due; it says what the waiting events would."""
        due, self.kv_snapshot_due = self.kv_snapshot_due, False
        if due:
            self._forget_kv_events()
        return due

    def take_kv_events(self) -> list[worker_pb2.KvEvent]:
        """Those that wait, once they have waited long enough."""
        return self.kv_events.take() if self._kv_timer is None else []

    def _kv_due(self) -> None:
        self._kv_timer = None
        self._wake.set()

    def _forget_kv_events(self) -> None:
        self.kv_events.clear()
        if self._kv_timer is not None:
            self._kv_timer.cancel()
            self._kv_timer = None


class SessionHub:
    """All sessions of a worker. Not reentrant: nothing here calls back into what reports to it."""

    def __init__(
        self,
        orphan_s: float,
        buffer_bytes: int,
        index: KvIndex,
        load: Callable[[], worker_pb2.LoadReport],
        clock: Callable[[], float],
    ) -> None:
        self._orphan_s = orphan_s
        self._buffer_bytes = buffer_bytes
        self._indexes = {DEVICE_TIER: index}
        self._load = load
        self._clock = clock
        self._sessions: dict[str, ControllerSession] = {}
        self._past: OrderedDict[str, ControllerSession] = (
            OrderedDict()
        )  # sessions that are gone: numbers are not issued twice
        self._lost: list[str] = []  # gone since `expired` was asked
        self._changed = asyncio.Event()

    def is_open(self, controller_id: str) -> bool:
        session = self._sessions.get(controller_id)
        return session is not None and session.stream is not None

    def attach(self, controller_id: str) -> SessionStream:
        """Opens a stream of that controller; one that was open is ended. Everything unacknowledged will be replayed."""
        if controller_id in self._lost:
            raise Unavailable("What this controller's last session left is being ended; open another one in a moment.")
        session = self._sessions.get(controller_id) or self._begin(controller_id)
        if session.stream is not None:
            session.stream.fail(Unavailable("The controller opened another session; this one is ended."))
        session.stream = SessionStream(session, cursor=session.replay.acknowledged)
        session.stream.wake()
        self._signal()
        return session.stream

    def detach(self, stream: SessionStream) -> None:
        stream.close()
        session = stream.session
        if session.stream is stream:
            session.stream = None
            session.orphan_deadline = self._clock() + self._orphan_s
            self._signal()

    async def changed(self) -> None:
        """Returns when a session was opened or lost."""
        await self._changed.wait()

    def report(self, controller_id: str, response: worker_pb2.SessionResponse) -> int:
        """Queues an event that must not be lost. Returns its sequence; 0 where nobody will ever read it."""
        session = self._sessions.get(controller_id)
        if session is None:
            return 0
        response.sequence = session.replay.next_sequence
        try:
            sequence = session.replay.append(response, response.ByteSize())
        except ReplayOverflow as overflow:
            if session.stream is not None:
                session.stream.fail(Overloaded(str(overflow)))
            self._end(session)
            return 0
        if session.stream is not None:
            session.stream.wake()
        return sequence

    def tell(self, controller_id: str, response: worker_pb2.SessionResponse) -> None:
        """Like `report`, for what may be lost with the stream: whoever asked for it asks again."""
        session = self._sessions.get(controller_id)
        if session is not None and session.stream is not None:
            session.stream.asides.append(response)
            session.stream.wake()

    def acknowledge(self, controller_id: str, sequence: int) -> None:
        session = self._sessions.get(controller_id)
        if session is not None:
            session.replay.acknowledge(sequence)

    def heartbeat(self) -> None:
        for stream in self._streams():
            stream.load_due = True
            stream.wake()

    def kv_stored(self, block_hashes: bytes, tier: str = DEVICE_TIER) -> None:
        self._indexes.setdefault(tier, KvIndex()).stored(block_hashes)
        self._kv_event(worker_pb2.KvEvent.KIND_STORED, block_hashes, tier)

    def kv_evicted(self, block_hashes: bytes, tier: str = DEVICE_TIER) -> None:
        self._indexes.setdefault(tier, KvIndex()).evicted(block_hashes)
        self._kv_event(worker_pb2.KvEvent.KIND_EVICTED, block_hashes, tier)

    def kv_snapshot(self, controller_id: str) -> None:
        """That controller gets everything afresh."""
        session = self._sessions.get(controller_id)
        if session is not None and session.stream is not None:
            session.stream.ask_kv_snapshot()

    def drain(self, stream: SessionStream) -> Iterator[worker_pb2.SessionResponse]:
        """What is to be written to `stream` now, oldest first."""
        replay = stream.session.replay
        while (entry := replay.after(stream.cursor)) is not None:
            stream.cursor = entry.sequence
            yield entry.item
        while stream.asides:
            yield stream.asides.popleft()
        if stream.load_due:
            stream.load_due = False
            yield worker_pb2.SessionResponse(load=self._load())
        if stream.take_kv_snapshot():
            yield from (self._kv_message(stream, [event]) for event in self._kv_snapshot())
        if events := stream.take_kv_events():
            yield self._kv_message(stream, events)

    def expired(self) -> list[str]:
        """Controllers whose session is gone, because it had no stream for too long or its buffer was full: their dispatches
        must be cancelled now."""
        now = self._clock()
        for session in list(self._sessions.values()):
            if session.stream is None and session.orphan_deadline <= now:
                self._end(session)
        gone, self._lost = self._lost, []
        return gone

    def all_acknowledged(self) -> bool:
        """True if no open stream lacks an event."""
        return all(not stream.session.replay.size_bytes for stream in self._streams())

    def _begin(self, controller_id: str) -> ControllerSession:
        past = self._past.pop(controller_id, None)
        first = past.replay.next_sequence if past is not None else 1
        session = ControllerSession(controller_id, ReplayBuffer(self._buffer_bytes, first))
        session.next_kv_sequence = past.next_kv_sequence if past is not None else 1
        self._sessions[controller_id] = session
        return session

    def _end(self, session: ControllerSession) -> None:
        del self._sessions[session.controller_id]
        self._lost.append(session.controller_id)
        session.replay.clear()
        self._past[session.controller_id] = session
        if len(self._past) > PAST_SESSIONS:
            self._past.popitem(last=False)

    def _streams(self) -> list[SessionStream]:
        return [session.stream for session in self._sessions.values() if session.stream is not None]

    def _signal(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _kv_event(self, kind: Kind, block_hashes: bytes, tier: str) -> None:
        for stream in self._streams():
            stream.add_kv_event(kind, block_hashes, tier)

    def _kv_snapshot(self) -> Iterator[worker_pb2.KvEvent]:
        """Begins with CLEARED: of all tiers."""
        yield worker_pb2.KvEvent(kind=worker_pb2.KvEvent.KIND_CLEARED)
        for tier, index in self._indexes.items():
            for block_hashes in index.snapshot():
                yield worker_pb2.KvEvent(kind=worker_pb2.KvEvent.KIND_STORED, block_hashes=block_hashes, tier=tier)

    def _kv_message(self, stream: SessionStream, events: list[worker_pb2.KvEvent]) -> worker_pb2.SessionResponse:
        """Numbers are contiguous per controller and incarnation; a message that begins with CLEARED starts afresh."""
        first = stream.session.next_kv_sequence
        stream.session.next_kv_sequence += len(events)
        return worker_pb2.SessionResponse(kv=worker_pb2.KvEvents(first_sequence=first, events=events))
