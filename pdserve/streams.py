"""Owns the streams that `generate` returns: iterators of deltas that take themselves up again after a lost connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Protocol, Self, cast

import grpc

from pdserve.generate_call import GenerateCall
from pdserve.generation import Delta, Generation
from pdserve.v1 import inference_pb2

CANCEL_DEADLINE_S = 1.0

Response = inference_pb2.GenerateResponse


class SyncAttempt(Protocol):
    """A running gRPC call; the stubs have no one type for it."""

    def __iter__(self) -> Iterator[Response]: ...

    def cancel(self) -> object: ...


class AsyncAttempt(Protocol):
    def __aiter__(self) -> AsyncIterator[Response]: ...

    def cancel(self) -> object: ...


OpenSync = Callable[[inference_pb2.GenerateRequest, float | None], SyncAttempt]
OpenAsync = Callable[[inference_pb2.GenerateRequest, float | None], AsyncAttempt]


class GenerationStream:
    """Iterator of Delta. Not taken to its end, it must be closed (it is a context manager): that cancels the request."""

    def __init__(self, call: GenerateCall, open_attempt: OpenSync, cancel: Callable[[str], None]) -> None:
        self._call = call
        self._open_attempt = open_attempt
        self._cancel = cancel
        self._deltas = self._run()

    @property
    def request_id(self) -> str:
        return self._call.request_id

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        """Raises the typed error of the request."""
        return next(self._deltas)

    def result(self) -> Generation:
        """Takes the stream to its end. Raises the typed error of the request."""
        for _ in self._deltas:
            pass
        return self._call.result()

    def close(self) -> None:
        """Ends the request in the cluster, if it has not ended."""
        cast("Closable", self._deltas).close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> Iterator[Delta]:
        call = self._call
        try:
            while not call.finished:
                attempt = self._open_attempt(call.message(), call.remaining_s(time.monotonic()))
                try:
                    for response in attempt:
                        yield from call.fold(response, time.monotonic())
                    wait_s = 0.0 if call.finished else call.ended_early()
                except grpc.RpcError as error:
                    wait_s = call.lost(error, time.monotonic())
                finally:
                    attempt.cancel()
                time.sleep(wait_s)
        finally:
            if not call.finished:
                self._cancel(call.request_id)


class Closable(Protocol):
    def close(self) -> None: ...


class AsyncGenerationStream:
    """Asynchronous iterator of Delta. Not taken to its end, it must be closed: that cancels the request."""

    def __init__(self, call: GenerateCall, open_attempt: OpenAsync, cancel: Callable[[str], None]) -> None:
        self._call = call
        self._open_attempt = open_attempt
        self._cancel = cancel
        self._deltas = self._run()

    @property
    def request_id(self) -> str:
        return self._call.request_id

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        """Raises the typed error of the request."""
        return await anext(self._deltas)

    async def result(self) -> Generation:
        """Takes the stream to its end. Raises the typed error of the request."""
        async for _ in self._deltas:
            pass
        return self._call.result()

    async def aclose(self) -> None:
        """Ends the request in the cluster, if it has not ended."""
        await cast("AsyncClosable", self._deltas).aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _run(self) -> AsyncIterator[Delta]:
        call = self._call
        try:
            while not call.finished:
                attempt = self._open_attempt(call.message(), call.remaining_s(time.monotonic()))
                try:
                    async for response in attempt:
                        for delta in call.fold(response, time.monotonic()):
                            yield delta
                    wait_s = 0.0 if call.finished else call.ended_early()
                except grpc.RpcError as error:
                    wait_s = call.lost(error, time.monotonic())
                finally:
                    attempt.cancel()
                await asyncio.sleep(wait_s)
        finally:
            if not call.finished:
                self._cancel(call.request_id)


class AsyncClosable(Protocol):
    async def aclose(self) -> None: ...
