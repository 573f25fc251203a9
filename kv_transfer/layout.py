"""Owns how KV is described to a peer: identity, layout groups, and the plan that tells whether two sides can exchange it.

Identity says what KV means and must be equal. Layout says how it lies in memory; today a plan exists for equal block
geometry only, everything else is refused by name, never repacked silently.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from kv_transfer.checksums import ALGORITHM
from pdserve.errors import LayoutMismatch
from pdserve.v1 import types_pb2


@dataclass(frozen=True, slots=True)
class KvIdentity:
    """What must be equal for KV to mean the same. digest: SHA-256, 32 bytes (`keys.identity_digest`)."""

    digest: bytes
    model: str
    kv_dtype: str
    layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def from_proto(cls, message: types_pb2.KvIdentity) -> KvIdentity:
        return cls(
            bytes(message.digest),
            message.model,
            message.kv_dtype,
            message.layers,
            message.kv_heads,
            message.head_dim,
        )

    def to_proto(self) -> types_pb2.KvIdentity:
        return types_pb2.KvIdentity(
            digest=self.digest,
            model=self.model,
            kv_dtype=self.kv_dtype,
            layers=self.layers,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
        )


@dataclass(frozen=True, slots=True)
class LayoutGroup:
    """How a group of layers lies in memory. block_bytes: one block of one layer, K and V together."""

    page_tokens: int
    layer_count: int
    head_count: int
    block_bytes: int
    kind: str = "k_v"
    first_layer: int = 0
    first_head: int = 0
    checksum: str = ALGORITHM

    @classmethod
    def from_proto(cls, message: types_pb2.LayoutGroup) -> LayoutGroup:
        return cls(
            kind=message.kind,
            page_tokens=message.page_tokens,
            first_layer=message.first_layer,
            layer_count=message.layer_count,
            first_head=message.first_head,
            head_count=message.head_count,
            block_bytes=message.block_bytes,
            checksum=message.checksum,
        )

    def to_proto(self) -> types_pb2.LayoutGroup:
        return types_pb2.LayoutGroup(
            kind=self.kind,
            page_tokens=self.page_tokens,
            first_layer=self.first_layer,
            layer_count=self.layer_count,
            first_head=self.first_head,
            head_count=self.head_count,
            block_bytes=self.block_bytes,
            checksum=self.checksum,
        )


def groups_from_proto(messages: Iterable[types_pb2.LayoutGroup]) -> tuple[LayoutGroup, ...]:
    return tuple(LayoutGroup.from_proto(message) for message in messages)


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """Geometry that both sides share: `layers` layers, blocks of `block_bytes` for `page_tokens` tokens."""

    layers: int
    page_tokens: int
    block_bytes: int

    def blocks_for(self, tokens: int) -> int:
        return math.ceil(tokens / self.page_tokens)

    def cached_blocks(self, cached_tokens: int) -> int:
        """Whole blocks among `cached_tokens`: the ones not to be sent."""
        return cached_tokens // self.page_tokens


def check_identity(source: KvIdentity, destination: KvIdentity) -> None:
    """Raises LayoutMismatch that names the first unequal field with both values. The digest, hardest to read, comes last."""
    for name in ("model", "kv_dtype", "layers", "kv_heads", "head_dim", "digest"):
        _check_equal(name, getattr(source, name), getattr(destination, name))


def plan_transfer(source: Sequence[LayoutGroup], destination: Sequence[LayoutGroup]) -> TransferPlan:
    """The plan by which blocks of `source` go to `destination`; LayoutMismatch where there is none."""
    _check_equal("number of layout groups", len(source), len(destination))
    if len(source) != 1:
        raise LayoutMismatch(f"KV of {len(source)} layout groups cannot be transferred: exactly one is supported.")
    here, there = source[0], destination[0]
    for field in fields(LayoutGroup):
        _check_equal(field.name, getattr(here, field.name), getattr(there, field.name))
    if here.kind != "k_v":
        raise LayoutMismatch(f"KV of kind {here.kind!r} cannot be transferred: only 'k_v' is supported.")
    if here.checksum != ALGORITHM:
        raise LayoutMismatch(f"Checksum {here.checksum!r} is not supported: both sides must use {ALGORITHM!r}.")
    if not (here.page_tokens and here.layer_count and here.block_bytes):
        raise LayoutMismatch(f"Layout group {here} has a zero size.")
    return TransferPlan(layers=here.layer_count, page_tokens=here.page_tokens, block_bytes=here.block_bytes)


def _check_equal(name: str, source: object, destination: object) -> None:
    if source != destination:
        raise LayoutMismatch(
            f"KV cannot be exchanged: {name} is {_readable(source)} at the source and {_readable(destination)} at the "
            "destination. Give both workers the same model and engine settings."
        )


def _readable(value: object) -> str:
    return value.hex()[:16] if isinstance(value, bytes) else repr(value)
