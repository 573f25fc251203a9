"""Owns the workers: registrations, one session each, their states, and the snapshot that placement looks at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import grpc

from controller import membership
from controller.chunk_reuse import RememberedReuse
from controller.kv_sources import best_source, with_pulls
from controller.membership import ConnectionLost, DeclareLost, Dial, Heard, Limits
from controller.pending_commands import PendingCommands
from controller.placement.snapshot import NO_REUSE, FleetSnapshot, Reuse
from controller.session_tasks import SessionTasks
from controller.worker_record import WorkerRecord
from controller.worker_session import SessionEnded, WorkerSession, command_error
from pdserve.errors import InvalidRequest, WorkerLost
from pdserve.v1 import membership_pb2, worker_pb2
from service_kit.logs import get_logger

MAX_WORKERS = 4096
MAX_NAME_CHARS = 256
MAX_ENDPOINTS = 16
FORGET_S = 60.0  # how long a worker that is gone stays in the status
SESSION_TIMEOUT_MS = 5000  # silence of ours after which a worker drops the session

log = get_logger(__name__)


class FleetSink(Protocol):
    """Who needs to know what happens to dispatches and workers."""

    def received(self, worker_id: str, response: worker_pb2.SessionResponse) -> None:
        """An event of a dispatch."""

    def reconciled(self, worker_id: str, snapshot: worker_pb2.WorkerSnapshot) -> None:
        """A session was opened: what the worker holds, it says."""

    def lost(self, worker_id: str, error: WorkerLost, *, died: bool) -> None:
        """Everything that was dispatched there is lost."""

    def changed(self, worker_id: str) -> None:
        """There may be more room than before."""


@dataclass(frozen=True, slots=True)
class FleetSettings:
    controller_id: str
    heartbeat_s: float
    heartbeat_misses: int
    stall_s: float = 10.0  # running sequences and no step for so long: the engine hangs
    credentials: grpc.ChannelCredentials | None = None

    @property
    def limits(self) -> Limits:
        return Limits(silence_s=self.heartbeat_s * self.heartbeat_misses)


class Fleet:
    def __init__(self, settings: FleetSettings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._limits = settings.limits
        self._clock = clock
        self._records: dict[str, WorkerRecord] = {}
        self._sessions = SessionTasks()
        self._sink: FleetSink | None = None
        self.commands = PendingCommands()

    def attach(self, sink: FleetSink) -> None:
        self._sink = sink

    # ---- what others ask

    def record(self, worker_id: str) -> WorkerRecord | None:
        return self._records.get(worker_id)

    def records(self) -> list[WorkerRecord]:
        return list(self._records.values())

    def snapshot(self) -> FleetSnapshot:
        return FleetSnapshot(tuple([record.view() for record in self._records.values()]))

    def reusable(self, block_hashes: bytes) -> dict[str, Reuse]:
        """What each worker need not compute of a prompt: what it holds, and what it would pull."""
        prices = {record.worker_id: record.prices() for record in self._records.values()}
        return with_pulls(self.snapshot().workers, self._held(block_hashes), prices)

    def _held(self, block_hashes: bytes) -> dict[str, Reuse]:
        """Workers that hold nothing are left out."""
        records = self._records.values()
        found = ((record.worker_id, record.holdings.reuse(block_hashes, record.prices())) for record in records)
        return {worker_id: reuse for worker_id, reuse in found if reuse != NO_REUSE}

    def chunk_reuse(self, remembered: RememberedReuse) -> dict[str, Reuse]:
        """The same for the chunks of a blended prompt, which are not pulled."""
        records = self._records.values()
        found = ((record.worker_id, remembered.at(record.holdings, record.prices())) for record in records)
        return {worker_id: reuse for worker_id, reuse in found if reuse != NO_REUSE}

    def kv_source(self, puller: str, block_hashes: bytes) -> worker_pb2.KvSource | None:
        """The worker that holds more of a prompt than `puller`, which is to compute it."""
        record = self._records.get(puller)
        if record is None:
            return None
        found = best_source(record.view(), self.snapshot().workers, self._held(block_hashes))
        if found is None:
            return None
        address = self._records[found.worker_id].info.address
        return worker_pb2.KvSource(worker_id=found.worker_id, address=address, tokens=found.tokens)

    def serves(self) -> bool:
        """True if any worker takes work."""
        return any(record.member.takes_work for record in self._records.values())

    def identity(self) -> bytes:
        """KV identity of the workers; empty while there is none."""
        return next((view.identity for view in self.snapshot().workers if view.ready), b"")

    def identities(self) -> frozenset[bytes]:
        """KV identities of all ready workers: more than one while they serve different models."""
        return frozenset(view.identity for view in self.snapshot().workers if view.ready)

    def layers(self) -> int:
        """Of the workers' model; 0 while there is none."""
        counts = (
            sum(group.layer_count for group in each.info.layout) for each in self._records.values() if each.view().ready
        )
        return next(counts, 0)

    def send(self, worker_id: str, request: worker_pb2.SessionRequest) -> None:
        """To a worker that is gone, nothing is sent: `lost` has said so, or is about to."""
        record = self._records.get(worker_id)
        if record is not None and record.session is not None:
            record.session.send(request)

    # ---- registration and sessions

    def register(self, info: membership_pb2.WorkerInfo) -> None:
        """Raises InvalidRequest. The caller repeats it until a session is open."""
        _check_info(info)
        record = self._records.get(info.worker_id)
        if record is None:
            if len(self._records) >= MAX_WORKERS:
                raise InvalidRequest(f"This controller knows {MAX_WORKERS} workers already.", param="worker_id")
            record = self._records[info.worker_id] = WorkerRecord(info.worker_id)
            log.info("worker_registered", worker_id=info.worker_id, address=info.address)
        if record.member.state == "GONE" or info.incarnation > record.member.incarnation:
            self._step(record, membership.Registered(info.incarnation, info.address))
            record.introduce(info)

    def _step(self, record: WorkerRecord, event: membership.Event) -> None:
        before = record.member
        member, commands = membership.step(before, event, self._limits, self._clock())
        record.member_changed(member)
        for command in commands:
            match command:
                case DeclareLost(reason=reason, silent=silent):
                    self._declare_lost(record, reason, died=not silent)
                case Dial():
                    self._dial(record, fresh=not member.redialling)
        if member.state != before.state:
            log.info("worker_state", worker_id=record.worker_id, state=member.state, reason=member.lost_reason)

    def _dial(self, record: WorkerRecord, *, fresh: bool) -> None:
        if fresh or record.session is None:
            opening = worker_pb2.OpenSession(
                controller_id=self._settings.controller_id, session_timeout_ms=SESSION_TIMEOUT_MS
            )
            line = _Line(self, record)
            record.session = WorkerSession(record.member.address, opening, line, self._settings.credentials)
            line.session = record.session
        self._sessions.start(record.worker_id, self._serve(record, record.session))

    async def _serve(self, record: WorkerRecord, session: WorkerSession) -> None:
        try:
            await session.serve()
        except SessionEnded as ended:
            event = ConnectionLost(ended.reason, ended.final)
        except Exception as error:
            log.exception("session_failed", error, worker_id=record.worker_id)
            event = ConnectionLost(f"The session failed here: {type(error).__name__}.", final=True)
        else:
            raise AssertionError("serve always raises")
        if record.session is session:
            log.info("session_ended", worker_id=record.worker_id, reason=event.reason)
            self._step(record, event)

    def _declare_lost(self, record: WorkerRecord, reason: str, *, died: bool) -> None:
        record.session = None
        self._sessions.end(record.worker_id)
        record.forget_load()
        error = WorkerLost(f"Worker {record.worker_id} was lost: {reason}")
        self.commands.worker_lost(record.worker_id, error)
        assert self._sink is not None
        self._sink.lost(record.worker_id, error, died=died)

    # ---- what workers say

    def opened(self, record: WorkerRecord, snapshot: worker_pb2.WorkerSnapshot) -> None:
        incarnation, draining = snapshot.worker.incarnation, snapshot.draining or snapshot.load.draining
        self._step(record, membership.SessionOpened(incarnation, draining))
        if record.member.state == "GONE":
            return
        record.introduce(snapshot.worker)
        record.report(snapshot.load, self._clock())
        assert self._sink is not None
        self._sink.reconciled(record.worker_id, snapshot)
        self._sink.changed(record.worker_id)

    def received(self, record: WorkerRecord, response: worker_pb2.SessionResponse) -> None:
        assert self._sink is not None
        now = self._clock()
        match response.WhichOneof("event"):
            case "tokens" | "started" | "failed" | "handoff":
                self._sink.received(record.worker_id, response)
            case "reserve":
                record.report(response.reserve.load, now)
                self._sink.received(record.worker_id, response)
            case "load":
                record.report(response.load, now)
                self._step(record, Heard(response.load.draining))
                self._sink.changed(record.worker_id)
                return
            case "result":
                result = response.result
                self.commands.settle(result.command_id, command_error(result) or result)
            case "kv":
                if not record.holdings.apply(response.kv):
                    log.warning("kv_events_missing", worker_id=record.worker_id, sequence=response.kv.first_sequence)
                    self.send(record.worker_id, worker_pb2.SessionRequest(kv_snapshot=worker_pb2.KvSnapshotRequest()))
            case _:
                pass  # what is unknown comes from a newer worker
        record.frame_s = now

    def drain_ordered(self, record: WorkerRecord) -> None:
        """It gets no work from now on."""
        self._step(record, membership.DrainOrdered())

    # ---- time

    def tick(self, held_up_s: float) -> None:
        """`held_up_s`: how late this call comes."""
        now = self._clock()
        for record in list(self._records.values()):
            if record.member.state != "GONE":
                self._step(record, membership.Tick(record.frame_s, held_up_s))
            if record.member.state == "GONE" and now - record.member.heard_s > FORGET_S:
                del self._records[record.worker_id]
            elif record.member.state != "GONE" and record.judge_stall(now, self._settings.stall_s):
                log.warning("engine_stalled", worker_id=record.worker_id, step=record.load.engine_step)
                assert self._sink is not None
                error = WorkerLost(f"The engine of worker {record.worker_id} hangs.")
                self._sink.lost(record.worker_id, error, died=True)

    async def close(self) -> None:
        await self._sessions.close()


class _Line:
    """Joins a session to its worker's record."""

    def __init__(self, fleet: Fleet, record: WorkerRecord) -> None:
        self._fleet = fleet
        self._record = record
        self.session: WorkerSession | None = None

    def opened(self, snapshot: worker_pb2.WorkerSnapshot) -> None:
        if self._record.session is self.session:
            self._fleet.opened(self._record, snapshot)

    def received(self, response: worker_pb2.SessionResponse) -> None:
        if self._record.session is self.session:
            self._fleet.received(self._record, response)


def _check_info(info: membership_pb2.WorkerInfo) -> None:
    if not 0 < len(info.worker_id) <= MAX_NAME_CHARS:
        raise InvalidRequest(f"worker_id must have 1 to {MAX_NAME_CHARS} characters.", param="worker_id")
    if not 0 < len(info.address) <= MAX_NAME_CHARS:
        raise InvalidRequest("address must be host:port.", param="address")
    if len(info.kv_endpoints) > MAX_ENDPOINTS or len(info.layout) > MAX_ENDPOINTS:
        raise InvalidRequest(f"At most {MAX_ENDPOINTS} kv_endpoints and layout groups.", param="kv_endpoints")
    if len(info.identity.digest) != 32:
        raise InvalidRequest("identity.digest must be a SHA-256 digest.", param="identity")
