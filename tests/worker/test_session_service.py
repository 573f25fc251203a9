"""The session's stream while the node under it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from pdserve.errors import WorkerLost
from pdserve.v1 import worker_pb2, worker_pb2_grpc
from worker_runtime.kv_index import KvIndex
from worker_runtime.session import SessionHub
from worker_runtime.session_service import SessionService


class EngineGone:
    """Every command finds the engine dead; what it said before comes after the first."""

    def __init__(self, hub: SessionHub) -> None:
        self._hub = hub

    def handle(self, controller_id: str, request: worker_pb2.SessionRequest) -> None:
        last_words = worker_pb2.SessionResponse(started=worker_pb2.DispatchStarted(cached_tokens=7))
        asyncio.get_running_loop().call_soon(self._hub.report, controller_id, last_words)
        raise WorkerLost("the engine process is gone")


async def requests() -> AsyncIterator[worker_pb2.SessionRequest]:
    yield worker_pb2.SessionRequest(open=worker_pb2.OpenSession(controller_id="c", session_timeout_ms=20_000))
    yield worker_pb2.SessionRequest(ack=worker_pb2.Ack())
    await asyncio.sleep(60)  # the other side stays, until its call is cancelled


async def test_a_command_that_finds_the_engine_dead_does_not_end_the_stream_before_its_last_words() -> None:
    hub = SessionHub(10.0, 2**20, KvIndex(), worker_pb2.LoadReport, asyncio.get_running_loop().time)
    server = grpc.aio.server()
    service = SessionService(hub, EngineGone(hub), lambda _controller_id: worker_pb2.WorkerSnapshot())
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with asyncio.timeout(20), grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = worker_pb2_grpc.WorkerServiceStub(channel).Session(requests())
            async for response in call:
                if response.WhichOneof("event") == "started":
                    break
            assert response.started.cached_tokens == 7
            call.cancel()
    finally:
        await server.stop(None)
