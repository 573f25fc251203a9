"""Owns what a worker says of itself to controllers: who it is, where it is reached, what it can do."""

from __future__ import annotations

import os
from collections.abc import Callable

from engine.protocol import EngineReady
from pdserve.v1 import membership_pb2
from worker_runtime.holding import Holding
from worker_runtime.kv_endpoint import KvEndpoint
from worker_runtime.node_settings import NodeSettings


class Introduction:
    """address: of the worker's gRPC endpoint, once it is bound. Roles are those of the moment."""

    def __init__(
        self, settings: NodeSettings, ready: EngineReady, kv: KvEndpoint, holding: Holding, address: Callable[[], str]
    ) -> None:
        self._settings = settings
        self._ready = ready
        self._kv = kv
        self._holding = holding
        self._address = address

    def to_proto(self) -> membership_pb2.WorkerInfo:
        settings, ready = self._settings, self._ready
        return membership_pb2.WorkerInfo(
            worker_id=settings.worker_id,
            incarnation=settings.incarnation,
            address=self._address(),
            roles=self._holding.to_proto(),
            identity=self._kv.side.identity.to_proto(),
            layout=[group.to_proto() for group in self._kv.side.groups],
            kv_endpoints=self._kv.endpoints,
            capabilities=self._capabilities(),
            pid=os.getpid(),
            engine_pid=ready.pid,
            version=settings.version,
        )

    def _capabilities(self) -> membership_pb2.Capabilities:
        ready, engine = self._ready, self._settings.config.engine
        return membership_pb2.Capabilities(
            push=True,
            first_token_at_prefill=True,
            exact_resume="seeded",
            max_context_tokens=ready.max_context_tokens,
            max_batch=engine.max_running,
            token_budget=engine.token_budget,
            blocks_total=ready.layout.blocks,
            block_tokens=ready.layout.page_tokens,
        )
