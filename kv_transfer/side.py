"""Owns KvSide: what one worker brings to every hand-off, as source and as destination."""

from __future__ import annotations

from dataclasses import dataclass

from kv_transfer.arena import Arena
from kv_transfer.layout import KvIdentity, LayoutGroup


@dataclass(frozen=True, slots=True)
class KvSide:
    """Issued once per process start. incarnation: of the worker; groups: how `arena` is laid out."""

    worker_id: str
    incarnation: int
    identity: KvIdentity
    groups: tuple[LayoutGroup, ...]
    arena: Arena
