"""Owns the sender's end of the control session: one gRPC Handoff stream, written and read by a task each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc

from kv_transfer.background import BackgroundTasks
from kv_transfer.outbox import Outbox
from pdserve.errors import PdserveError, TransferFailed
from pdserve.v1 import handoff_pb2, handoff_pb2_grpc

OnAnswer = Callable[[handoff_pb2.HandoffResponse], None]
OnLost = Callable[[PdserveError], None]
_Call = grpc.aio.StreamStreamCall[handoff_pb2.HandoffRequest, handoff_pb2.HandoffResponse]


class ControlSession:
    """Calls `on_answer` per response, and `on_lost` once when the stream ends, for whatever reason.

    Reads and writes run in tasks that are cancelled only by `close`: grpc.aio cancels the whole call with a cancelled read.
    """

    def __init__(self, channel: grpc.aio.Channel, on_answer: OnAnswer, on_lost: OnLost) -> None:
        self._on_answer = on_answer
        self._on_lost = on_lost
        self._call: _Call = handoff_pb2_grpc.HandoffServiceStub(channel).Handoff(None)
        self._outbox: Outbox[handoff_pb2.HandoffRequest] = Outbox()
        self.ended = asyncio.Event()
        self._tasks = BackgroundTasks()
        self._tasks.spawn(self._write(), "handoff-write")
        self._tasks.spawn(self._read(), "handoff-read")

    def put(self, request: handoff_pb2.HandoffRequest) -> None:
        self._outbox.put(request)

    def half_close(self) -> None:
        """FIN: nothing more will be announced or sent."""
        self._outbox.close()

    async def _write(self) -> None:
        try:
            async for request in self._outbox:
                await self._call.write(request)
            await self._call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reader learns why the call ended, and says so

    async def _read(self) -> None:
        error: PdserveError = TransferFailed("The decode worker ended the hand-off's session.")
        try:
            async for response in self._call:
                self._on_answer(response)
        except grpc.aio.AioRpcError as lost:
            error = TransferFailed(f"Hand-off session lost: {lost.code().name} {lost.details()}")
        finally:
            self.ended.set()
            self._on_lost(error)

    async def close(self) -> None:
        self._call.cancel()
        await self._tasks.close()
