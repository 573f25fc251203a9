"""Owns the choice of an eviction policy by name. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from kv_store.eviction import EvictionPolicy
from kv_store.gdsf import Gdsf
from kv_store.lru import Lru
from kv_store.s3_fifo import S3Fifo
from pdserve.errors import ConfigInvalid

POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = MappingProxyType({"lru": Lru, "s3-fifo": S3Fifo, "gdsf": Gdsf})


def policy_of(name: str) -> Callable[[], EvictionPolicy]:
    """Makes the policy `name`: a new one at each call. Raises ConfigInvalid for an unknown name."""
    if name not in POLICIES:
        raise ConfigInvalid(f"There is no eviction policy {name!r}: use one of {', '.join(POLICIES)}.")
    return POLICIES[name]
