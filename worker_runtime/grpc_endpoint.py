"""Owns the worker's gRPC server: both services, health, and the address that peers are given."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pdserve.errors import Unavailable
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


class GrpcEndpoint:
    def __init__(self, host: str) -> None:
        self._server = grpc.aio.server(options=_OPTIONS)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        port = self._server.add_insecure_port(f"{host}:0")
        if not port:
            raise Unavailable(f"No port of {host} can be bound for gRPC.")
        self.address = f"{host}:{port}"

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
