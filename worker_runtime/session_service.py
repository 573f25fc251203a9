"""Owns the WorkerService servicer: one gRPC stream, its two directions, and its ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import grpc

from pdserve.errors import DeadlineExceeded, InvalidRequest, WorkerLost
from pdserve.v1 import worker_pb2, worker_pb2_grpc
from service_kit.logs import get_logger
from worker_runtime.messages import MAX_NAME_CHARS
from worker_runtime.session import SessionHub, SessionStream

OPEN_DEADLINE_S = 5.0
MIN_SILENCE_S = 0.5
MAX_SILENCE_S = 600.0
STUCK_WRITE_S = 1.0  # time for a failing stream to say so before it is cut

log = get_logger(__name__)


class CommandSink(Protocol):
    def handle(self, controller_id: str, request: worker_pb2.SessionRequest) -> None:
        """Carries out one command. Raises InvalidRequest for a malformed one, which ends the stream that sent it."""


class SessionService(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(
        self,
        hub: SessionHub,
        commands: CommandSink,
        snapshot: Callable[[str], worker_pb2.WorkerSnapshot],
    ) -> None:
        self._hub = hub
        self._commands = commands
        self._snapshot = snapshot

    async def Session(  # noqa: N802 (the name of the RPC)
        self,
        request_iterator: AsyncIterator[worker_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[worker_pb2.SessionRequest, worker_pb2.SessionResponse],
    ) -> AsyncIterator[worker_pb2.SessionResponse]:
        requests = aiter(request_iterator)
        opening = await _opening(requests)
        silence_s = min(max(opening.session_timeout_ms / 1000, MIN_SILENCE_S), MAX_SILENCE_S)
        stream = self._hub.attach(opening.controller_id)
        log.info("session_opened", controller_id=opening.controller_id, replay_from=stream.cursor + 1)
        reader = asyncio.create_task(self._read(requests, opening.controller_id, silence_s))
        reader.add_done_callback(lambda _done: stream.wake())
        watchdog = _Watchdog(reader)
        try:
            yield worker_pb2.SessionResponse(snapshot=self._snapshot(opening.controller_id))
            while not reader.done() and stream.error is None:
                for response in self._hub.drain(stream):
                    yield response
                await stream.wait()
            self._raise_end(reader, stream)
        finally:
            watchdog.stop()
            reader.cancel()
            self._hub.detach(stream)
            log.info("session_closed", controller_id=opening.controller_id)

    async def _read(
        self, requests: AsyncIterator[worker_pb2.SessionRequest], controller_id: str, silence_s: float
    ) -> None:
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    request = await anext(requests)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise DeadlineExceeded(f"No frame came from the controller for {silence_s} s.") from error
            try:
                self._commands.handle(controller_id, request)
            except WorkerLost as lost:
                # The node ends by the same loss; until then the stream carries what the engine said last.
                log.info("command_without_engine", message=lost.message)

    def _raise_end(self, reader: asyncio.Task[None], stream: SessionStream) -> None:
        if stream.error is not None:
            raise stream.error
        reader.result()


class _Watchdog:
    """Cuts a stream whose reader has ended while its writer is stuck in a peer that takes nothing."""

    def __init__(self, reader: asyncio.Task[None]) -> None:
        self._writer = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False
        reader.add_done_callback(self._arm)

    def stop(self) -> None:
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self, _reader: asyncio.Task[None]) -> None:
        if not self._stopped and self._writer is not None:
            self._timer = asyncio.get_running_loop().call_later(STUCK_WRITE_S, self._writer.cancel)


async def _opening(requests: AsyncIterator[worker_pb2.SessionRequest]) -> worker_pb2.OpenSession:
    try:
        async with asyncio.timeout(OPEN_DEADLINE_S):
            request = await anext(requests)
    except (StopAsyncIteration, TimeoutError) as error:
        raise InvalidRequest("A session begins with OpenSession; none came.") from error
    name = request.open.controller_id
    if request.WhichOneof("command") != "open" or not 0 < len(name) <= MAX_NAME_CHARS:
        raise InvalidRequest("A session begins with OpenSession and its controller_id.", param="open")
    return request.open
