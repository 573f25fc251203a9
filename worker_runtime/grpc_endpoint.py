"""Owns the worker's gRPC server: both services, health, reflection, the status of errors, and the address that peers are given."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeAlias, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pdserve.errors import ConfigInvalid, PdserveError
from pdserve.v1 import handoff_pb2, handoff_pb2_grpc, worker_pb2, worker_pb2_grpc

MAX_MESSAGE_BYTES = 64 * 2**20
_SERVICES = (
    worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name,
    handoff_pb2.DESCRIPTOR.services_by_name["HandoffService"].full_name,
)
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
)
Request = TypeVar("Request")
Response = TypeVar("Response")
# Generic in the stubs only.
Handler: TypeAlias = "grpc.RpcMethodHandler[Request, Response]"
Context: TypeAlias = "grpc.aio.ServicerContext[Request, Response]"


class GrpcEndpoint:
    def __init__(self, host: str, credentials: grpc.ServerCredentials | None) -> None:
        self._server = grpc.aio.server(options=_OPTIONS, interceptors=(_StatusOfErrors(),))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self.address = f"{host}:{self._bind(f'{host}:0', credentials)}"

    def _bind(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        try:
            if credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigInvalid(f"worker.host: no port of {address} can be bound for gRPC.") from error

    async def start(
        self, sessions: worker_pb2_grpc.WorkerServiceServicer, handoffs: handoff_pb2_grpc.HandoffServiceServicer
    ) -> None:
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(sessions, self._server)
        handoff_pb2_grpc.add_HandoffServiceServicer_to_server(handoffs, self._server)
        await self.serving(True)
        await self._server.start()

    async def serving(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *_SERVICES):
            await self._health.set(service, status)

    async def close(self, grace_s: float) -> None:
        await self._server.stop(grace_s)


class _StatusOfErrors(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Ends a stream whose servicer raised with the error's own status, its reason in the trailing metadata."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler[Request, Response]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler[Request, Response]:
        handler = await continuation(handler_call_details)
        if handler is None or not (handler.request_streaming and handler.response_streaming):
            return handler
        serve = handler.stream_stream

        async def stream(
            requests: AsyncIterator[Request], context: Context[Request, Response]
        ) -> AsyncIterator[Response]:
            answers: AsyncGenerator[Response, None] = serve(requests, context)  # type: ignore[misc, assignment, arg-type]
            try:
                async with aclosing(answers):
                    async for answer in answers:
                        yield answer
            except PdserveError as error:
                await context.abort(error.grpc_status, error.message, (("pdserve-reason", error.reason),))

        return grpc.stream_stream_rpc_method_handler(
            stream,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
