"""Owns the least of a controller that a fleet can be driven by: takes registrations, opens sessions, keeps what comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import grpc

from pdserve.v1 import membership_pb2, membership_pb2_grpc, types_pb2, worker_pb2, worker_pb2_grpc

T = TypeVar("T")
CONTROLLER_ID = "stub"
HEARTBEAT_S = 0.5
DEADLINE_S = 60.0


class StubWorker:
    """One session."""

    def __init__(self, info: membership_pb2.WorkerInfo, heard: asyncio.Condition) -> None:
        self.info = info
        self.responses: list[worker_pb2.SessionResponse] = []
        self._heard = heard
        self._commands: asyncio.Queue[worker_pb2.SessionRequest] = asyncio.Queue()
        opening = worker_pb2.OpenSession(controller_id=CONTROLLER_ID, session_timeout_ms=10_000)
        self.send(worker_pb2.SessionRequest(open=opening))

    def send(self, command: worker_pb2.SessionRequest) -> None:
        self._commands.put_nowait(command)

    async def run(self) -> None:
        async with grpc.aio.insecure_channel(self.info.address) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            async for response in stub.Session(self._requests()):
                self.responses.append(response)
                if response.sequence:
                    self.send(worker_pb2.SessionRequest(ack=worker_pb2.Ack(sequence=response.sequence)))
                async with self._heard:
                    self._heard.notify_all()

    async def _requests(self) -> AsyncIterator[worker_pb2.SessionRequest]:
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    command = await self._commands.get()
            except TimeoutError:
                command = worker_pb2.SessionRequest(ack=worker_pb2.Ack(sequence=0))
            yield command


class StubController(membership_pb2_grpc.MembershipServiceServicer):
    def __init__(self) -> None:
        self.address = ""
        self.workers: dict[str, StubWorker] = {}
        self._heard = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    async def RegisterWorker(  # noqa: N802 (the name of the RPC)
        self,
        request: membership_pb2.RegisterWorkerRequest,
        context: grpc.aio.ServicerContext[membership_pb2.RegisterWorkerRequest, membership_pb2.RegisterWorkerResponse],
    ) -> membership_pb2.RegisterWorkerResponse:
        worker_id = request.worker.worker_id
        if worker_id not in self.workers:
            self.workers[worker_id] = StubWorker(request.worker, self._heard)
            self._tasks.add(asyncio.create_task(self.workers[worker_id].run()))
        return membership_pb2.RegisterWorkerResponse(controller_id=CONTROLLER_ID, lease_ms=10_000)

    async def until(self, found: Callable[[], T | None]) -> T:
        """Waits until `found` gives something other than None."""
        async with asyncio.timeout(DEADLINE_S), self._heard:
            while (result := found()) is None:
                await self._heard.wait()
            return result

    async def sessions(self, count: int) -> None:
        """Waits until `count` workers have sent their snapshot."""
        await self.until(lambda: True if sum(bool(w.responses) for w in self.workers.values()) >= count else None)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def stub_controller() -> AsyncIterator[StubController]:
    controller = StubController()
    server = grpc.aio.server()
    membership_pb2_grpc.add_MembershipServiceServicer_to_server(controller, server)
    controller.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield controller
    finally:
        await controller.close()
        await server.stop(None)


def dispatch_id(key: int) -> types_pb2.DispatchId:
    return types_pb2.DispatchId(request_key=key, attempt=1)
