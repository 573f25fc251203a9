"""Owns the clients of a pdserve cluster: `Client` (blocking) and `AsyncClient`, both over gRPC.

    with Client("127.0.0.1:9000") as client:
        for delta in client.generate("def read_lines(path):", Sampling(max_tokens=64)):
            print(delta.text, end="")

Errors are the classes of `pdserve.errors`. A lost connection is taken up again within the deadline, without a token lost or told
twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import grpc

from pdserve.connection import ApiKey, Tls, authorization, open_async_channel, open_channel
from pdserve.generate_call import GenerateCall, Patience, new_call
from pdserve.generation import (
    Choice,
    Delta,
    Generation,
    KvBlend,
    Prompt,
    RequestOptions,
    Route,
    Sampling,
    TokenLogprobs,
    Usage,
)
from pdserve.local_cluster import LocalCluster, LocalPool
from pdserve.rpc_errors import error_from_rpc
from pdserve.streams import CANCEL_DEADLINE_S, AsyncAttempt, AsyncGenerationStream, GenerationStream, SyncAttempt
from pdserve.v1 import inference_pb2, inference_pb2_grpc

__all__ = [
    "AsyncClient", "AsyncGenerationStream", "Choice", "Client", "Delta", "Generation", "GenerationStream", "KvBlend", "LocalPool",
    "RequestOptions", "Route", "Sampling", "Tls", "TokenLogprobs", "Usage",
]  # fmt: skip

CONNECT_S = 5.0
RESUME_S = 30.0
_DEFAULT_SAMPLING = Sampling()
_DEFAULT_OPTIONS = RequestOptions()


class Client:
    """Blocking client. Thread-safe; close it, or use it as a context manager."""

    def __init__(
        self,
        address: str,
        api_key: ApiKey | None = None,
        tls: Tls | None = None,
        connect_s: float = CONNECT_S,
        resume_s: float = RESUME_S,
    ) -> None:
        """address: host:port of the gRPC API. api_key: a key, or a callable that is asked for each call.

        connect_s: how long an unreachable cluster is tried; resume_s: how long a running request waits for it to come back.
        """
        self._channel = open_channel(address, tls)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._api_key = api_key
        self._patience_s = (connect_s, resume_s)
        self._cluster: LocalCluster | None = None

    @classmethod
    def local(cls, pool: LocalPool | None = None) -> Client:
        """Starts a cluster on this machine that ends with the client, or with this process.

        Needs the server packages. Raises Unavailable where the cluster does not start.
        """
        cluster = LocalCluster.start(pool if pool is not None else LocalPool())
        client = cls(cluster.grpc_address)
        client._cluster = cluster
        return client

    def generate(
        self,
        prompt: Prompt,
        sampling: Sampling = _DEFAULT_SAMPLING,
        n: int = 1,
        stop: Sequence[str] = (),
        timeout_s: float | None = None,
        options: RequestOptions = _DEFAULT_OPTIONS,
    ) -> GenerationStream:
        """prompt: text, or token ids. n choices share one prefill. timeout_s travels with the request through the cluster.

        The request starts when the stream is first read. Its iterator raises: InvalidRequest, PromptTooLong, ModelNotFound,
        InvalidApiKey, Overloaded, Unavailable, DeadlineExceeded, InternalError.
        """
        patience = Patience(timeout_s, *self._patience_s)
        call = GenerateCall(new_call(prompt, sampling, n, stop, options), patience, time.monotonic())
        return GenerationStream(call, self._attempt, self._cancel_quietly)

    def cancel(self, request_id: str) -> bool:
        """True if a live request had this id. Raises the typed error of the call."""
        request = inference_pb2.CancelRequest(request_id=request_id)
        try:
            return self._stub.Cancel(request, timeout=self._patience_s[0], metadata=authorization(self._api_key)).found
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error

    def close(self) -> None:
        self._channel.close()
        if self._cluster is not None:
            self._cluster.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _attempt(self, message: inference_pb2.GenerateRequest, timeout_s: float | None) -> SyncAttempt:
        return self._stub.Generate(message, timeout=timeout_s, metadata=authorization(self._api_key))

    def _cancel_quietly(self, request_id: str) -> None:
        """Where it does not get through, the cluster ends the request a few seconds after its last reader."""
        request = inference_pb2.CancelRequest(request_id=request_id)
        with contextlib.suppress(grpc.RpcError, ValueError):  # ValueError: the channel is closed
            self._stub.Cancel(request, timeout=CANCEL_DEADLINE_S, metadata=authorization(self._api_key))


class AsyncClient:
    """asyncio client. Made and used in one event loop; close it, or use it as an asynchronous context manager."""

    def __init__(
        self,
        address: str,
        api_key: ApiKey | None = None,
        tls: Tls | None = None,
        connect_s: float = CONNECT_S,
        resume_s: float = RESUME_S,
    ) -> None:
        """As for Client."""
        self._channel = open_async_channel(address, tls)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._api_key = api_key
        self._patience_s = (connect_s, resume_s)
        self._cancelling: set[asyncio.Task[bool]] = set()

    def generate(
        self,
        prompt: Prompt,
        sampling: Sampling = _DEFAULT_SAMPLING,
        n: int = 1,
        stop: Sequence[str] = (),
        timeout_s: float | None = None,
        options: RequestOptions = _DEFAULT_OPTIONS,
    ) -> AsyncGenerationStream:
        """As for Client."""
        patience = Patience(timeout_s, *self._patience_s)
        call = GenerateCall(new_call(prompt, sampling, n, stop, options), patience, time.monotonic())
        return AsyncGenerationStream(call, self._attempt, self._cancel_soon)

    async def cancel(self, request_id: str) -> bool:
        """True if a live request had this id. Raises the typed error of the call."""
        return await self._cancel(request_id, self._patience_s[0])

    async def close(self) -> None:
        await asyncio.gather(*self._cancelling, return_exceptions=True)
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _attempt(self, message: inference_pb2.GenerateRequest, timeout_s: float | None) -> AsyncAttempt:
        return self._stub.Generate(message, timeout=timeout_s, metadata=authorization(self._api_key))

    async def _cancel(self, request_id: str, timeout_s: float) -> bool:
        request = inference_pb2.CancelRequest(request_id=request_id)
        try:
            answer = await self._stub.Cancel(request, timeout=timeout_s, metadata=authorization(self._api_key))
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        return answer.found

    def _cancel_soon(self, request_id: str) -> None:
        """In a task of its own: the stream may be closed because its task was cancelled. `close` waits for it."""
        task = asyncio.get_running_loop().create_task(self._cancel(request_id, CANCEL_DEADLINE_S))
        self._cancelling.add(task)
        task.add_done_callback(self._cancelled)

    def _cancelled(self, task: asyncio.Task[bool]) -> None:
        """Where it did not get through, the cluster ends the request a few seconds after its last reader."""
        self._cancelling.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not complain
