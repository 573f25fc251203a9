"""Owns the making of a worker's tiers from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kv_store.disk.disk_tier import DiskTier
from kv_store.disk.layout import DiskLimits
from kv_store.disk.posix import posix_mount
from kv_store.host_tier import HostTier
from kv_store.page import PageFormat
from kv_store.policies import policy_of
from kv_store.redis_link import RedisSettings
from kv_store.redis_tier import RedisTier
from kv_store.tier import PageTier, TierListener
from kv_store.tier_index import TierIndex
from kv_store.tiered_store import TieredStore
from service_kit.config import StoreConfig


@dataclass(frozen=True, slots=True)
class StorePlace:
    """disk_dir: of this worker alone."""

    disk_dir: Path
    redis_password: str = field(default="", repr=False)


def open_store(
    config: StoreConfig, place: StorePlace, page_format: PageFormat, listener_of: Callable[[str], TierListener]
) -> TieredStore:
    """Reads what the disk holds from earlier runs. Raises ConfigInvalid where a tier cannot be opened with these settings."""
    policy = policy_of(config.eviction)
    index = TierIndex(config.host_bytes, policy(), config.ttl_s, config.tenant_bytes, policy)
    host = HostTier(page_format, index, listener_of("host"))
    lower: list[PageTier] = []
    if config.disk_bytes:
        limits = DiskLimits(config.disk_bytes, config.ttl_s, config.tenant_bytes)
        lower.append(DiskTier(posix_mount(place.disk_dir), page_format, limits, policy(), listener_of("disk")))
    if config.redis_url:
        settings = RedisSettings(config.redis_url, place.redis_password, config.ttl_s)
        lower.append(RedisTier(settings, page_format))
    return TieredStore(host, lower, page_format.size_bytes)
