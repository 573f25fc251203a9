"""Owns the prefill worker's side of hand-offs: HandoffSender starts them, one Handoff pushes one request's KV."""

from __future__ import annotations

from collections.abc import Mapping

import grpc

from kv_transfer.background import BackgroundTasks
from kv_transfer.handoff import Handoff, HandoffOrder, HandoffOutcome
from kv_transfer.peers import OpenChannel, Peers, open_insecure_channel
from kv_transfer.side import KvSide
from kv_transfer.transport import Transport
from service_kit.config import TransferConfig

__all__ = ["Handoff", "HandoffOrder", "HandoffOutcome", "HandoffSender"]


class HandoffSender:
    """One per worker. `open_channel(address)` makes gRPC channels (TLS is the caller's business)."""

    def __init__(
        self,
        side: KvSide,
        transports: Mapping[str, Transport],
        config: TransferConfig,
        open_channel: OpenChannel = open_insecure_channel,
    ) -> None:
        self._side = side
        self._config = config
        self._peers = Peers(transports, config, open_channel)
        self._tasks = BackgroundTasks()

    def start(self, order: HandoffOrder) -> Handoff:
        """Connects and begins at once, so that both overlap the prompt's computation. Failures come by `outcome()`."""
        handoff = Handoff(order, self._side, self._peers, self._config)
        self._tasks.spawn(handoff.run(), f"handoff-{order.dispatch}")
        return handoff

    def channel(self, address: str) -> grpc.aio.Channel:
        """The one that control sessions to this worker use; kept open, and the sender's to close."""
        return self._peers.channel(address)

    async def close(self) -> None:
        """Ends every hand-off, without a word to the peers: their heartbeats tell them."""
        await self._tasks.close()
        await self._peers.close()
