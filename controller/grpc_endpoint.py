"""Owns the controller's gRPC server: its port, TLS, limits, health, reflection; and the credentials to dial workers with."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from controller.grpc_api import InferenceApi, MembershipApi
from controller.grpc_guards import Guards
from pdserve.errors import ConfigInvalid
from pdserve.v1 import inference_pb2, inference_pb2_grpc, membership_pb2, membership_pb2_grpc
from service_kit.api_keys import ApiKeys
from service_kit.config import ClusterConfig, SecurityConfig

CLOSE_GRACE_S = 1.0
ENVELOPE_BYTES = 64 * 2**10  # of a message beyond its prompt
_SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    membership_pb2.DESCRIPTOR.services_by_name["MembershipService"].full_name,
)


class GrpcEndpoint:
    def __init__(self, config: ClusterConfig, keys: ApiKeys) -> None:
        """Raises ConfigInvalid where the port is taken or a TLS file cannot be read."""
        limit = config.controller.max_body_bytes + ENVELOPE_BYTES
        options = [("grpc.max_receive_message_length", limit), ("grpc.so_reuseport", 0)]
        self._server = grpc.aio.server(options=options, interceptors=[Guards(keys)])
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        host, wanted = config.controller.host, config.controller.grpc_port
        port = self._bind(f"{host}:{wanted}", config.security)
        self._address = f"{host}:{port}"
        self.worker_credentials = worker_credentials(config.security)

    def _bind(self, address: str, security: SecurityConfig) -> int:
        try:
            if security.tls_cert is None or security.tls_key is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, _server_credentials(security))
        except RuntimeError as error:
            raise ConfigInvalid(f"controller.grpc_port: {address} cannot be bound. Use another port.") from error

    async def start(self, inference: InferenceApi, membership: MembershipApi) -> str:
        """Returns the bound address."""
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, self._server)
        membership_pb2_grpc.add_MembershipServiceServicer_to_server(membership, self._server)
        await self.serving(True)
        await self._server.start()
        return self._address

    async def serving(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *_SERVICES):
            await self._health.set(service, status)

    async def close(self) -> None:
        await self._server.stop(CLOSE_GRACE_S)


def _server_credentials(security: SecurityConfig) -> grpc.ServerCredentials:
    assert security.tls_cert is not None
    assert security.tls_key is not None
    try:
        pair = (security.tls_key.read_bytes(), security.tls_cert.read_bytes())
        authority = security.tls_ca.read_bytes() if security.tls_ca is not None else None
    except OSError as error:
        raise ConfigInvalid(f"security: {error.filename} cannot be read: {error.strerror}.") from error
    return grpc.ssl_server_credentials([pair], authority, require_client_auth=False)


def worker_credentials(security: SecurityConfig) -> grpc.ChannelCredentials | None:
    """Mutual TLS between processes, where a CA is given."""
    if security.tls_ca is None or security.tls_cert is None or security.tls_key is None:
        return None
    return grpc.ssl_channel_credentials(
        security.tls_ca.read_bytes(), security.tls_key.read_bytes(), security.tls_cert.read_bytes()
    )
