"""Owns the worker's gRPC server: its services, the address that peers are given, and who may speak with it."""

from __future__ import annotations

from pdserve.errors import ConfigInvalid
from pdserve.v1 import (
    handoff_pb2,
    handoff_pb2_grpc,
    kv_pull_pb2,
    kv_pull_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from service_kit.api_keys import ApiKeys
from service_kit.config import ClusterConfig
from service_kit.exposure import is_loopback
from service_kit.grpc_server import build_server, server_credentials

_SERVICES = (
    worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name,
    handoff_pb2.DESCRIPTOR.services_by_name["HandoffService"].full_name,
    kv_pull_pb2.DESCRIPTOR.services_by_name["KvPullService"].full_name,
)


def check_worker_exposure(config: ClusterConfig) -> None:
    """Raises ConfigInvalid where others can reach the worker and no CA tells who they are: a worker knows no API keys."""
    security = config.security
    mutual = None not in (security.tls_ca, security.tls_cert, security.tls_key)
    if is_loopback(config.worker.host) or security.insecure or mutual:
        return
    raise ConfigInvalid(
        f"worker.host = {config.worker.host}: others can reach that address, so security.tls_ca, tls_cert and tls_key must be "
        "set. Use 127.0.0.1, or security.insecure=true (--insecure) where the network is trusted."
    )


class GrpcEndpoint:
    def __init__(self, config: ClusterConfig) -> None:
        """With a CA, peers must show a certificate; without one the worker serves plainly, on loopback or where that was allowed.

        Raises ConfigInvalid where no port can be bound or a TLS file cannot be read."""
        self._grpc = build_server(_SERVICES, ApiKeys())
        security = config.security
        mutual = security.tls_ca is not None
        credentials = server_credentials(security, clients_need_certificates=True) if mutual else None
        self.address = self._grpc.bind(config.worker.host, 0, credentials)

    async def start(
        self,
        sessions: worker_pb2_grpc.WorkerServiceServicer,
        handoffs: handoff_pb2_grpc.HandoffServiceServicer,
        pulls: kv_pull_pb2_grpc.KvPullServiceServicer | None,
    ) -> None:
        """pulls: None = every pull is refused as unimplemented."""
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(sessions, self._grpc.server)
        handoff_pb2_grpc.add_HandoffServiceServicer_to_server(handoffs, self._grpc.server)
        if pulls is not None:
            kv_pull_pb2_grpc.add_KvPullServiceServicer_to_server(pulls, self._grpc.server)
        await self._grpc.start()

    async def serving(self, ready: bool) -> None:
        await self._grpc.serving(ready)

    async def close(self, grace_s: float) -> None:
        await self._grpc.stop(grace_s)
