"""A prefill worker written by hand, for tests of what the receiver makes of it."""

from __future__ import annotations

import asyncio
import secrets

import grpc

from kv_transfer.checksums import block_checksums
from kv_transfer.transport import Connection
from pdserve.v1 import handoff_pb2, handoff_pb2_grpc, types_pb2, worker_pb2
from tests.kv_transfer.rig import Rig

BLOCK_BYTES = 2048


class Peer:
    """A prefill worker written by hand: says exactly what the test tells it to."""

    def __init__(self, rig: Rig, grant: worker_pb2.Grant, tokens: int = 32) -> None:
        self.rig = rig
        self.grant = grant
        self.tokens = tokens
        self.hello = secrets.token_bytes(16)
        self.channel = grpc.aio.insecure_channel(rig.address)
        self.call = handoff_pb2_grpc.HandoffServiceStub(self.channel).Handoff(None)
        self.connection: Connection | None = None

    async def connect(self) -> None:
        assert self.rig.sending is not None
        self.connection = await self.rig.sending.connect(self.grant.endpoint.address, self.hello, 2)

    def begin_message(self) -> handoff_pb2.Begin:
        side = self.rig.source
        return handoff_pb2.Begin(
            ticket=self.grant.ticket,
            dispatch=types_pb2.DispatchId(request_key=1, attempt=1),
            incarnation=1,
            worker_id="p0",
            transport=self.grant.endpoint.transport,
            identity=side.identity.to_proto(),
            layout=[group.to_proto() for group in side.groups],
            token_count=self.tokens,
            connection=self.hello,
        )

    async def say(self, **message: object) -> None:
        await self.call.write(handoff_pb2.HandoffRequest(**message))  # type: ignore[arg-type]

    async def begin(self) -> None:
        await self.connect()
        await self.say(begin=self.begin_message())
        assert (await self.hear("accepted")).accepted.lease_ms == self.grant.lease_ms

    async def hear(self, kind: str) -> handoff_pb2.HandoffResponse:
        """The next answer that is no heartbeat; it must be `kind`."""
        async with asyncio.timeout(30):
            while True:
                answer = await self.call.read()
                assert isinstance(answer, handoff_pb2.HandoffResponse), "the stream ended"
                if answer.WhichOneof("message") != "heartbeat":
                    assert answer.WhichOneof("message") == kind, answer
                    return answer

    def segment(self, index: int = 0, layer: int = 0, first: int = 0, count: int = 2) -> handoff_pb2.Segment:
        data = self.data(layer, first, count)
        return handoff_pb2.Segment(
            tag=self.grant.first_tag + index,
            layer=layer,
            first_block=first,
            block_count=count,
            length=len(data),
            checksums=block_checksums(data, BLOCK_BYTES),
        )

    def data(self, layer: int, first: int, count: int) -> memoryview:
        return self.rig.source.arena.blocks(layer, 10 + first, count)

    async def send(self, segment: handoff_pb2.Segment) -> None:
        assert self.connection is not None
        data = self.data(segment.layer, segment.first_block, segment.block_count)
        async with asyncio.timeout(30):
            await self.connection.send(segment.tag, data)

    async def deliver_all(self) -> None:
        for layer in range(4):
            segment = self.segment(index=layer, layer=layer)
            await self.say(segment=segment)
            await self.send(segment)
            assert (await self.hear("segment_done")).segment_done.tag == segment.tag

    async def close(self) -> None:
        self.call.cancel()
        await self.channel.close(None)
