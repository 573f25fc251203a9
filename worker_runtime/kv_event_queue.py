"""Owns the KV events that wait for one stream: in order, neighbours of one kind and tier as one event. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from kv_transfer.keys import HASH_BYTES
from pdserve.v1 import worker_pb2
from worker_runtime.kv_index import HASHES_PER_EVENT

_BYTES_PER_EVENT = HASH_BYTES * HASHES_PER_EVENT

Kind: TypeAlias = worker_pb2.KvEvent.Kind.ValueType


@dataclass(slots=True)
class _Waiting:
    kind: Kind
    tier: str
    pieces: list[bytes] = field(default_factory=list)
    size_bytes: int = 0


class KvEventQueue:
    """An event of many pages costs its reader little more than one of a single page."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self.size_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, kind: Kind, block_hashes: bytes, tier: str) -> None:
        last = self._waiting[-1] if self._waiting else None
        if (
            last is None
            or (last.kind, last.tier) != (kind, tier)
            or last.size_bytes + len(block_hashes) > _BYTES_PER_EVENT
        ):
            last = _Waiting(kind, tier)
            self._waiting.append(last)
        last.pieces.append(block_hashes)
        last.size_bytes += len(block_hashes)
        self.size_bytes += len(block_hashes)

    def take(self) -> list[worker_pb2.KvEvent]:
        """All of them, oldest first; none is left."""
        events = [
            worker_pb2.KvEvent(kind=waiting.kind, block_hashes=b"".join(waiting.pieces), tier=waiting.tier)
            for waiting in self._waiting
        ]
        self.clear()
        return events

    def clear(self) -> None:
        self._waiting.clear()
        self.size_bytes = 0
