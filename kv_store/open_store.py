"""Owns the making of a worker's tiers from its configuration."""

from __future__ import annotations

from collections.abc import Callable

from kv_store.host_tier import HostTier
from kv_store.lru import Lru
from kv_store.page import PageFormat
from kv_store.tier import TierListener
from kv_store.tier_index import TierIndex
from kv_store.tiered_store import TieredStore
from service_kit.config import StoreConfig


def open_store(config: StoreConfig, page_format: PageFormat, listener_of: Callable[[str], TierListener]) -> TieredStore:
    """Raises ConfigInvalid where a tier cannot be opened with these settings."""
    host = HostTier(
        page_format,
        TierIndex(config.host_bytes, Lru(), config.ttl_s, config.tenant_bytes),
        listener_of("host"),
    )
    return TieredStore(host, (), page_format.size_bytes)
