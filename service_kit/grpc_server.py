"""Owns how a process of the cluster serves and dials gRPC: limits, keepalive, TLS, API keys, health, reflection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pdserve.errors import ConfigInvalid, InvalidApiKey
from service_kit.api_keys import ApiKeys
from service_kit.config import SecurityConfig
from service_kit.grpc_errors import ErrorStatuses, status_metadata
from service_kit.grpc_handlers import Context, Continuation, Handler, Request, Response, with_behaviour

MAX_MESSAGE_BYTES = 64 * 2**20
# Services for programs and operators outside the cluster.
KEYED_PREFIXES = ("/pdserve.v1.InferenceService/", "/pdserve.v1.KvService/")


@dataclass(frozen=True, slots=True)
class ServerLimits:
    max_receive_bytes: int = MAX_MESSAGE_BYTES
    max_send_bytes: int = MAX_MESSAGE_BYTES


class ApiKeyGuard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses calls of InferenceService and KvService without a valid key. The cluster's own services are guarded by mutual TLS."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    async def intercept_service(
        self, continuation: Continuation[Request, Response], handler_call_details: grpc.HandlerCallDetails
    ) -> Handler[Request, Response]:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(KEYED_PREFIXES):
            return handler
        metadata = cast("Sequence[tuple[str, str | bytes]]", handler_call_details.invocation_metadata or ())
        presented = next((str(value) for name, value in metadata if name == "authorization"), None)
        return handler if self._keys.accepts(presented) else _refusal(handler)


def _refusal(handler: Handler[Request, Response]) -> Handler[Request, Response]:
    error = InvalidApiKey("The API key is missing or wrong. Send it as metadata `authorization: Bearer KEY`.")

    async def refuse(request: Request, context: Context[Request, Response]) -> Response:
        await context.abort(error.grpc_status, error.message, status_metadata(error))

    return with_behaviour(handler, refuse)


class GrpcServer:
    """`build_server` makes it; servicers are added to `server`, then `bind`, then `start`."""

    def __init__(self, server: grpc.aio.Server, services: Sequence[str]) -> None:
        self.server = server
        self._services = tuple(services)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)

    def bind(self, host: str, port: int, credentials: grpc.ServerCredentials | None) -> str:
        """Returns host:port; port 0 = a free one. Raises ConfigInvalid where it cannot be had."""
        address = f"{host}:{port}"
        try:
            if credentials is None:
                return f"{host}:{self.server.add_insecure_port(address)}"
            return f"{host}:{self.server.add_secure_port(address, credentials)}"
        except RuntimeError as error:
            raise ConfigInvalid(f"gRPC: {address} cannot be bound. Use another port.") from error

    async def start(self) -> None:
        await self.serving(True)
        await self.server.start()

    async def serving(self, ready: bool) -> None:
        """What health checks are answered."""
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *self._services):
            await self._health.set(service, status)

    async def stop(self, grace_s: float) -> None:
        await self.server.stop(grace_s)


def build_server(services: Sequence[str], keys: ApiKeys, limits: ServerLimits = ServerLimits()) -> GrpcServer:
    """services: full names, for health and reflection. keys: empty = no service asks for one."""
    options = (
        ("grpc.max_receive_message_length", limits.max_receive_bytes),
        ("grpc.max_send_message_length", limits.max_send_bytes),
        ("grpc.so_reuseport", 0),  # a taken port is an error, not a shared port
        # Clients ping idle streams to see cuts; without these gRPC answers them with GOAWAY too_many_pings.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    )
    server = grpc.aio.server(options=options, interceptors=(ApiKeyGuard(keys), ErrorStatuses()))
    return GrpcServer(server, services)


def server_credentials(security: SecurityConfig, *, clients_need_certificates: bool) -> grpc.ServerCredentials | None:
    """None = no TLS configured. Raises ConfigInvalid where a file cannot be read or the CA is missing."""
    if security.tls_cert is None or security.tls_key is None:
        return None
    if clients_need_certificates and security.tls_ca is None:
        raise ConfigInvalid("security.tls_ca: is needed where clients must show certificates.")
    root = _read(security.tls_ca) if security.tls_ca is not None else None
    pair = (_read(security.tls_key), _read(security.tls_cert))
    return grpc.ssl_server_credentials([pair], root, require_client_auth=clients_need_certificates)


def channel_credentials(security: SecurityConfig) -> grpc.ChannelCredentials | None:
    """To dial another process of the cluster; None = no TLS configured. Without a CA, our own certificate is the one to trust."""
    if security.tls_cert is None or security.tls_key is None:
        return None
    root = _read(security.tls_ca or security.tls_cert)
    return grpc.ssl_channel_credentials(root, _read(security.tls_key), _read(security.tls_cert))


def worker_credentials(security: SecurityConfig) -> grpc.ChannelCredentials | None:
    """To dial a worker: mutual TLS where the cluster has a CA; without one workers serve plainly."""
    return channel_credentials(security) if security.tls_ca is not None else None


def open_channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """To another process of the cluster. A cut is seen within 2 s, a restarted peer is found again within 1 s."""
    options = (
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 2_000),  # the deadline of an attempt: a busy peer answers late
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.keepalive_time_ms", 1_000),
        ("grpc.keepalive_timeout_ms", 1_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
    )
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigInvalid(f"security: {path} cannot be read: {error.strerror}.") from error
