"""Owns a controller for tests: a real membership server, one real gRPC session per worker, everything that came kept."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TypeVar

import grpc

from pdserve.v1 import membership_pb2, membership_pb2_grpc, worker_pb2, worker_pb2_grpc

DEADLINE_S = 180.0  # two engine processes that import torch took 55 s on a busy machine
T = TypeVar("T")


class SessionTwin:
    """One session as its controller sees it, over several streams. Acknowledges by itself unless told not to."""

    def __init__(
        self,
        controller_id: str,
        address: str,
        *,
        acknowledges: bool = True,
        timeout_ms: int = 30_000,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.credentials = credentials
        self.controller_id = controller_id
        self.address = address
        self.acknowledges = acknowledges
        self.timeout_ms = timeout_ms
        self.snapshots: list[worker_pb2.WorkerSnapshot] = []
        self.events: list[worker_pb2.SessionResponse] = []  # each sequence once
        self.loads: list[worker_pb2.LoadReport] = []
        self.kv: list[worker_pb2.KvEvents] = []
        self.answers: list[worker_pb2.CommandResult] = []  # those that are not replayed
        self.repeated = 0
        self.status: grpc.StatusCode | None = None  # with which the last stream ended
        self._last = 0
        self._news = asyncio.Event()
        self._channel: grpc.aio.Channel | None = None
        self._requests: asyncio.Queue[worker_pb2.SessionRequest] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> SessionTwin:
        known = len(self.snapshots)
        self.status = None
        self._requests = asyncio.Queue()
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = (
            grpc.aio.insecure_channel(self.address, options=options)
            if self.credentials is None
            else grpc.aio.secure_channel(self.address, self.credentials, options=options)
        )
        self.send(
            worker_pb2.SessionRequest(
                open=worker_pb2.OpenSession(controller_id=self.controller_id, session_timeout_ms=self.timeout_ms)
            )
        )
        self._task = asyncio.create_task(self._read(self._channel, self._requests))
        await self.until(lambda: len(self.snapshots) > known)
        return self

    async def drop(self) -> None:
        """Cuts the stream, as a lost connection would."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=DEADLINE_S)
        if self._channel is not None:
            await self._channel.close(None)

    def send(self, request: worker_pb2.SessionRequest) -> None:
        self._requests.put_nowait(request)

    def acknowledge(self) -> None:
        self.send(worker_pb2.SessionRequest(ack=worker_pb2.Ack(sequence=self._last)))

    async def until(self, holds: Callable[[], T], deadline_s: float = DEADLINE_S) -> T:
        """Waits until `holds()` is true, looking again at every event."""
        async with asyncio.timeout(deadline_s):
            while not (found := holds()):
                self._news.clear()
                await self._news.wait()
            return found

    async def until_finished(self, key: int, choices: int = 1) -> None:
        await self.until(lambda: len(self.finished(key)) == choices)

    async def until_tokens(self, key: int, count: int) -> None:
        await self.until(lambda: len(self.tokens(key).get(0, ())) >= count)

    async def until_of(self, kind: str, count: int) -> None:
        await self.until(lambda: len(self.of(kind)) >= count)

    async def until_next_load(self) -> None:
        known = len(self.loads)
        await self.until(lambda: len(self.loads) > known)

    def of(self, kind: str) -> list[worker_pb2.SessionResponse]:
        return [event for event in self.events if event.WhichOneof("event") == kind]

    def tokens(self, key: int, attempt: int = 1) -> dict[int, list[int]]:
        """Per choice, in order of arrival. Asserts that indices of a choice follow each other."""
        found: dict[int, dict[int, int]] = defaultdict(dict)
        for event in self.of("tokens"):
            batch = event.tokens
            columns = zip(
                batch.request_keys, batch.attempts, batch.choices, batch.indices, batch.token_ids, strict=True
            )
            for request_key, tried, choice, index, token_id in columns:
                if (request_key, tried) == (key, attempt):
                    assert index not in found[choice], "a token came twice"
                    found[choice][index] = token_id
        return {choice: [row[index] for index in sorted(row)] for choice, row in found.items()}

    def finished(self, key: int, attempt: int = 1) -> dict[int, int]:
        """Finish reason per choice that has one."""
        reasons: dict[int, int] = {}
        for event in self.of("tokens"):
            batch = event.tokens
            for column, reason in enumerate(batch.finish_reasons):
                if reason and (batch.request_keys[column], batch.attempts[column]) == (key, attempt):
                    reasons[batch.choices[column]] = reason
        return reasons

    def failures(self, key: int) -> list[worker_pb2.DispatchFailed]:
        return [event.failed for event in self.of("failed") if event.failed.dispatch.request_key == key]

    async def blocks_free(self, count: int) -> None:
        """Waits until the worker reports so many free blocks, and nothing leaked. The second load from now on is the first
        that the engine surely made after this call."""
        fresh = len(self.loads) + 2
        await self.until(lambda: len(self.loads) >= fresh and self.loads[-1].blocks_free == count)
        assert self.loads[-1].blocks_leaked == 0
        assert self.loads[-1].reserved_blocks == 0

    async def _read(self, channel: grpc.aio.Channel, requests: asyncio.Queue[worker_pb2.SessionRequest]) -> None:
        call = worker_pb2_grpc.WorkerServiceStub(channel).Session(_drained(requests))
        try:
            async for response in call:
                self._take(response)
            self.status = grpc.StatusCode.OK
        except grpc.aio.AioRpcError as error:
            self.status = error.code()
        finally:
            self._news.set()

    def _take(self, response: worker_pb2.SessionResponse) -> None:
        match response.WhichOneof("event"):
            case "snapshot":
                self.snapshots.append(response.snapshot)
            case "load":
                self.loads.append(response.load)
                if self.acknowledges:
                    self.acknowledge()
            case "kv":
                self.kv.append(response.kv)
            case "result" if not response.sequence:
                self.answers.append(response.result)
            case _:
                self._take_sequenced(response)
        self._news.set()

    def _take_sequenced(self, response: worker_pb2.SessionResponse) -> None:
        if response.sequence <= self._last:
            self.repeated += 1
            return
        assert response.sequence == self._last + 1, "an event was lost"
        self._last = response.sequence
        self.events.append(response)


async def _drained(
    requests: asyncio.Queue[worker_pb2.SessionRequest],
) -> AsyncIterator[worker_pb2.SessionRequest]:
    while True:
        yield await requests.get()


class ControllerTwin(membership_pb2_grpc.MembershipServiceServicer):
    """Keeps the last registration of every worker."""

    def __init__(self, controller_id: str) -> None:
        self.controller_id = controller_id
        self.workers: dict[str, membership_pb2.WorkerInfo] = {}
        self.registrations = 0
        self.sessions: list[SessionTwin] = []
        self.credentials: grpc.ChannelCredentials | None = None  # to dial workers with
        self.address = ""
        self._news = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int = 0, credentials: grpc.ServerCredentials | None = None) -> ControllerTwin:
        self._server = grpc.aio.server()
        membership_pb2_grpc.add_MembershipServiceServicer_to_server(self, self._server)
        wanted = f"127.0.0.1:{port}"
        bound = (
            self._server.add_insecure_port(wanted)
            if credentials is None
            else self._server.add_secure_port(wanted, credentials)
        )
        self.address = f"127.0.0.1:{bound}"
        await self._server.start()
        return self

    async def close(self) -> None:
        for session in self.sessions:
            await session.drop()
        if self._server is not None:
            await self._server.stop(None)

    async def RegisterWorker(  # noqa: N802
        self,
        request: membership_pb2.RegisterWorkerRequest,
        context: grpc.aio.ServicerContext[membership_pb2.RegisterWorkerRequest, membership_pb2.RegisterWorkerResponse],
    ) -> membership_pb2.RegisterWorkerResponse:
        self.workers[request.worker.worker_id] = request.worker
        self.registrations += 1
        self._news.set()
        return membership_pb2.RegisterWorkerResponse(controller_id=self.controller_id, lease_ms=1000)

    async def registered(self, worker_ids: Iterable[str], deadline_s: float = DEADLINE_S) -> None:
        async with asyncio.timeout(deadline_s):
            while not set(worker_ids) <= self.workers.keys():
                self._news.clear()
                await self._news.wait()

    async def registered_again(self, deadline_s: float = DEADLINE_S) -> None:
        known = self.registrations
        async with asyncio.timeout(deadline_s):
            while self.registrations == known:
                self._news.clear()
                await self._news.wait()

    async def session(self, worker_id: str, *, acknowledges: bool = True, timeout_ms: int = 30_000) -> SessionTwin:
        await self.registered([worker_id])
        session = SessionTwin(
            self.controller_id,
            self.workers[worker_id].address,
            acknowledges=acknowledges,
            timeout_ms=timeout_ms,
            credentials=self.credentials,
        )
        self.sessions.append(session)
        return await session.open()
