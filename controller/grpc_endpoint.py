"""Owns the controller's gRPC server: its services, its bounds, its address."""

from __future__ import annotations

from controller.grpc_api import InferenceApi, MembershipApi
from controller.kv_api import KvApi
from pdserve.v1 import inference_pb2, inference_pb2_grpc, kv_pb2, kv_pb2_grpc, membership_pb2, membership_pb2_grpc
from service_kit.api_keys import ApiKeys
from service_kit.config import ClusterConfig
from service_kit.grpc_server import ServerLimits, build_server, server_credentials

CLOSE_GRACE_S = 1.0
ENVELOPE_BYTES = 64 * 2**10  # of a message beyond its prompt
_SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    kv_pb2.DESCRIPTOR.services_by_name["KvService"].full_name,
    membership_pb2.DESCRIPTOR.services_by_name["MembershipService"].full_name,
)


class GrpcEndpoint:
    def __init__(self, config: ClusterConfig, keys: ApiKeys) -> None:
        """Raises ConfigInvalid where the port is taken or a TLS file cannot be read."""
        limits = ServerLimits(max_receive_bytes=config.controller.max_body_bytes + ENVELOPE_BYTES)
        self._grpc = build_server(_SERVICES, keys, limits)
        credentials = server_credentials(config.security, clients_need_certificates=False)
        self._address = self._grpc.bind(config.controller.host, config.controller.grpc_port, credentials)

    async def start(self, inference: InferenceApi, membership: MembershipApi, kv: KvApi) -> str:
        """Returns the bound address."""
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, self._grpc.server)
        membership_pb2_grpc.add_MembershipServiceServicer_to_server(membership, self._grpc.server)
        kv_pb2_grpc.add_KvServiceServicer_to_server(kv, self._grpc.server)
        await self._grpc.start()
        return self._address

    async def serving(self, ready: bool) -> None:
        await self._grpc.serving(ready)

    async def close(self) -> None:
        await self._grpc.stop(CLOSE_GRACE_S)
