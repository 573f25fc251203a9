"""Owns a prefill worker's stand-in as a process of its own: sends one large hand-off, again and again, until it is killed.

Arguments: transport, gRPC address of the receiver, the serialized grant in hex, tokens. Prints "sending" when bytes flow.
"""

from __future__ import annotations

import asyncio
import sys

from kv_transfer.leases import DispatchKey
from kv_transfer.sender import HandoffOrder, HandoffSender
from kv_transfer.transports import open_transport
from pdserve.v1 import worker_pb2
from service_kit.config import TransferConfig
from tests.kv_transfer.processes import CONFIG, GEOMETRY
from tests.kv_transfer.rig import fill, make_side


async def main(transport: str, address: str, grant: worker_pb2.Grant, tokens: int) -> None:
    config = TransferConfig.model_validate(CONFIG)
    side = make_side("p0", GEOMETRY)
    fill(side)
    sender = HandoffSender(side, {transport: open_transport(transport, config, "127.0.0.1")}, config)
    key = DispatchKey(grant.dispatch.request_key, grant.dispatch.attempt)
    handoff = sender.start(HandoffOrder(key, grant, address, tokens))
    blocks = tokens // 16
    handoff.source_blocks(tuple(range(blocks)))
    for layer in range(GEOMETRY.layers - 1):  # the last layer never comes: the kill does
        for block in range(blocks):
            handoff.kv_ready(layer, block, 1)
            await asyncio.sleep(0)
            if layer == 0 and block == 2:
                sys.stdout.write("sending\n")
                sys.stdout.flush()
    await handoff.outcome()


if __name__ == "__main__":
    asyncio.run(
        main(sys.argv[1], sys.argv[2], worker_pb2.Grant.FromString(bytes.fromhex(sys.argv[3])), int(sys.argv[4]))
    )
