"""Owns the one stream to a worker: opens it, writes commands, hands on events without gap or repetition, acknowledges.

Sequences of events go on over a redial: the worker replays what was not acknowledged, and what was seen before is dropped here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol, TypeAlias

import grpc

from pdserve.errors import PdserveError, Unavailable
from pdserve.v1 import worker_pb2, worker_pb2_grpc
from service_kit.logs import get_logger

DIAL_S = 2.0
ACK_PERIOD_S = 0.25
ACK_EVENTS = 256
MAX_FRAME_BYTES = 64 * 2**20

log = get_logger(__name__)

Call: TypeAlias = "grpc.aio.StreamStreamCall[worker_pb2.SessionRequest, worker_pb2.SessionResponse]"


class SessionSink(Protocol):
    """Who hears what the worker says. Not called again after `WorkerSession.serve` has ended."""

    def opened(self, snapshot: worker_pb2.WorkerSnapshot) -> None: ...

    def received(self, response: worker_pb2.SessionResponse) -> None: ...


class SessionEnded(Exception):
    """The stream is over. `final`: the worker dropped the session itself, so that a redial would find another one."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.final = final


class WorkerSession:
    """Survives redials; one per incarnation of a worker and life of the controller."""

    def __init__(
        self,
        address: str,
        opening: worker_pb2.OpenSession,
        sink: SessionSink,
        credentials: grpc.ChannelCredentials | None,
    ) -> None:
        self._address = address
        self._opening = opening
        self._sink = sink
        self._credentials = credentials
        self._outbox: deque[worker_pb2.SessionRequest] = deque()
        self._wake = asyncio.Event()
        self._seen = 0
        self._acknowledged = 0

    def send(self, request: worker_pb2.SessionRequest) -> None:
        """Queued until the stream is open. What a breaking stream swallows is found out by `opened`."""
        self._outbox.append(request)
        self._wake.set()

    async def serve(self) -> None:
        """One dial and the stream's whole life. Always raises SessionEnded."""
        async with self._channel() as channel:
            call = worker_pb2_grpc.WorkerServiceStub(channel).Session(None)
            writer = asyncio.create_task(self._write(call))
            writer.add_done_callback(lambda _done: call.cancel())  # half a session is none
            try:
                await self._read(call)
            except asyncio.CancelledError as error:
                raise _ended_by_writer(writer) or error from None
            except grpc.aio.AioRpcError as error:
                # The worker dropped what we had not acknowledged: nothing can be replayed.
                final = error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                raise SessionEnded(f"{error.code().name}: {error.details()}", final=final) from error
            finally:
                writer.cancel()
                call.cancel()
                await asyncio.gather(writer, return_exceptions=True)
        raise SessionEnded("The worker closed the stream.")

    def _channel(self) -> grpc.aio.Channel:
        options = [
            ("grpc.use_local_subchannel_pool", 1),  # a redial must not wait out the back-off of the last connection
            ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
            ("grpc.max_send_message_length", MAX_FRAME_BYTES),
            ("grpc.enable_http_proxy", 0),
        ]
        if self._credentials is None:
            return grpc.aio.insecure_channel(self._address, options=options)
        return grpc.aio.secure_channel(self._address, self._credentials, options=options)

    async def _read(self, call: Call) -> None:
        try:
            async with asyncio.timeout(DIAL_S):
                first = await call.read()
        except TimeoutError as error:
            raise SessionEnded(f"No snapshot came within {DIAL_S:g} s.") from error
        if not isinstance(first, worker_pb2.SessionResponse) or first.WhichOneof("event") != "snapshot":
            raise SessionEnded("The worker's first message was no snapshot.")
        self._sink.opened(first.snapshot)
        while True:
            # No deadline here: `membership` counts silence, and ends this task.
            response = await call.read()
            if not isinstance(response, worker_pb2.SessionResponse):
                return
            if response.sequence:
                if response.sequence <= self._seen:
                    continue
                self._seen = response.sequence
                if self._seen - self._acknowledged >= ACK_EVENTS:
                    self._wake.set()
            self._sink.received(response)

    async def _write(self, call: Call) -> None:
        """Commands as they come, and an Ack every ACK_PERIOD_S: it is our heartbeat too."""
        await call.write(worker_pb2.SessionRequest(open=self._opening))
        loop = asyncio.get_running_loop()
        next_ack_s = loop.time() + ACK_PERIOD_S
        while True:
            try:
                async with asyncio.timeout_at(next_ack_s):
                    await self._wake.wait()
            except TimeoutError:
                pass  # time for the Ack
            self._wake.clear()
            while self._outbox:
                await call.write(self._outbox.popleft())
            if loop.time() >= next_ack_s or self._seen - self._acknowledged >= ACK_EVENTS:
                self._acknowledged = self._seen
                await call.write(worker_pb2.SessionRequest(ack=worker_pb2.Ack(sequence=self._seen)))
                next_ack_s = loop.time() + ACK_PERIOD_S


def _ended_by_writer(writer: asyncio.Task[None]) -> SessionEnded | None:
    """A cancelled call looks to its reader like a cancelled task."""
    if not writer.done() or writer.cancelled():
        return None
    return SessionEnded(f"Writing to the worker failed: {writer.exception()}")


def command_error(result: worker_pb2.CommandResult) -> PdserveError | None:
    """What a CommandResult says."""
    return Unavailable(f"The worker refused: {result.message or result.reason}") if result.reason else None
