"""Owns a decode worker's stand-in as a process of its own. Argument: transport.

Prints one line: the gRPC address and the serialized grant in hex. Lives until it is killed.
"""

from __future__ import annotations

import asyncio
import sys

import grpc

from kv_transfer.leases import DispatchKey
from kv_transfer.receiver import HandoffReceiver, Reservation
from kv_transfer.transports import open_transport
from pdserve.v1 import handoff_pb2_grpc
from service_kit.config import TransferConfig
from tests.kv_transfer.processes import CONFIG, GEOMETRY
from tests.kv_transfer.rig import RecordingDestination, make_side


async def main(transport: str) -> None:
    config = TransferConfig.model_validate(CONFIG)
    side = make_side("d0", GEOMETRY, incarnation=2)
    receiver = HandoffReceiver(
        side, {transport: open_transport(transport, config, "127.0.0.1")}, config, RecordingDestination()
    )
    await receiver.start()
    server = grpc.aio.server()
    handoff_pb2_grpc.add_HandoffServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    blocks = tuple(range(GEOMETRY.blocks))
    grant = receiver.reserve(Reservation(DispatchKey(1, 1), blocks, blocks, 0, GEOMETRY.blocks * 16), transport)
    sys.stdout.write(f"127.0.0.1:{port} {grant.SerializeToString().hex()}\n")
    sys.stdout.flush()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
