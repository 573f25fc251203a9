"""A redis-server for the tests of one module, and tiers over it that are closed at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from kv_store.backoff import Backoff
from kv_store.redis_link import RedisSettings
from kv_store.redis_tier import RedisTier
from tests.kv_store.redis_rig import FORMAT, GENEROUS_S, Opened, raw
from tests.kv_store.redis_server import RedisServer, running_redis


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    raw(shared_server).flushall()
    return shared_server


@pytest.fixture
def opened() -> Iterator[Opened]:
    tiers: list[RedisTier] = []

    def open_tier(url: str, budget_s: float = GENEROUS_S, clock: Callable[[], float] = time.monotonic) -> RedisTier:
        settings = RedisSettings(url, read_budget_s=budget_s)
        tiers.append(RedisTier(settings, FORMAT, lambda: Backoff(1.0, 60.0), clock))
        return tiers[-1]

    yield open_tier
    for tier in tiers:
        tier.close()
