"""The Redis tier against a real redis-server: every way in which Redis fails."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kv_store.redis_link import RedisSettings
from kv_store.redis_tier import RedisTier
from kv_store.tier import TierFailed
from pdserve.errors import ConfigInvalid
from tests.kv_store.redis_rig import (
    FORMAT,
    GENEROUS_S,
    LONGEST_S,
    SECRET,
    Clock,
    Opened,
    ids,
    load,
    page_of,
    raw,
    store,
)
from tests.kv_store.redis_server import RedisServer, running_redis
from tests.service_kit import certificates


def test_a_redis_that_is_not_there_costs_one_failure_per_pause(server: RedisServer, opened: Opened) -> None:
    with socket.socket() as unused:  # bound, and nobody listens
        unused.bind(("127.0.0.1", 0))
        clock = Clock()
        tier = opened(f"redis://127.0.0.1:{unused.getsockname()[1]}", clock=clock)
        with pytest.raises(TierFailed):
            tier.present(ids(0))
        for _ in range(20):
            assert tier.present(ids(0)) == 0
            assert load(tier, 0) == 0
            assert store(tier, 0) == 0
            assert tier.remove([page_of(0).id.key]) == 0
            assert tier.used_bytes() == 0
        assert tier.counters.failures == 1
        assert tier.counters.dropped == 20
        assert tier.counters.misses == 20
        clock.now_s += 1.0
        with pytest.raises(TierFailed):
            load(tier, 0)
        clock.now_s += 1.0
        assert tier.present(ids(0)) == 0  # the second pause is longer
        assert tier.counters.failures == 2


def test_a_redis_that_was_killed_is_used_again_when_it_is_back_and_its_pages_are_missed(
    tmp_path: Path, opened: Opened
) -> None:
    with running_redis(tmp_path) as server:
        clock = Clock()
        tier = opened(server.url, clock=clock)
        store(tier, 0, 1)
        server.kill()
        with pytest.raises(TierFailed):
            load(tier, 0, 1)
        server.start()
        clock.now_s += 1.0
        assert load(tier, 0, 1) == 0
        assert store(tier, 0, 1) == 2
        assert load(tier, 0, 1) == 2


def test_a_redis_that_stands_still_fails_within_the_budget_and_is_used_again_when_it_goes_on(
    tmp_path: Path, opened: Opened
) -> None:
    with running_redis(tmp_path) as server:
        store(opened(server.url), 0)
        tier = opened(server.url, budget_s=0.1)
        assert load_soon(tier) == 1
        server.freeze()
        started_s = time.monotonic()
        with pytest.raises(TierFailed):
            tier.present(ids(0))
        assert time.monotonic() - started_s < 5.0
        assert load(tier, 0) == 0
        server.thaw()
        assert load_soon(tier) == 1


def load_soon(tier: RedisTier) -> int:
    """On a busy machine a good Redis, too, may answer late once."""
    deadline_s = time.monotonic() + 60.0
    while time.monotonic() < deadline_s:
        try:
            if load(tier, 0):
                return 1
        except TierFailed:
            continue
    return 0


def test_a_redis_that_answers_a_byte_at_a_time_does_not_hold_a_request_up(server: RedisServer, opened: Opened) -> None:
    store(opened(server.url), 0)
    with dripping(server.port) as port:
        tier = opened(f"redis://127.0.0.1:{port}", budget_s=0.1)
        started_s = time.monotonic()
        with pytest.raises(TierFailed):
            load(tier, 0)
        assert time.monotonic() - started_s < 10.0  # the whole answer takes fifty
        assert tier.counters.failures == 1


@contextmanager
def dripping(port: int) -> Iterator[int]:
    """A port that passes on what Redis answers, one byte every 50 ms."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LONGEST_S)
        thread = threading.Thread(target=_drip, args=(listener, port, ended), daemon=True)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            ended.set()
            thread.join(LONGEST_S)


def _drip(listener: socket.socket, port: int, ended: threading.Event) -> None:
    client, _ = listener.accept()
    with client, socket.create_connection(("127.0.0.1", port)) as upstream:
        client.settimeout(0.01)
        upstream.settimeout(0.01)
        while not ended.wait(0.05):
            with suppress(OSError):
                upstream.sendall(client.recv(4096))
            with suppress(OSError):
                client.sendall(upstream.recv(1))


def test_a_full_redis_drops_saves_and_still_answers_loads(tmp_path: Path, opened: Opened) -> None:
    with running_redis(tmp_path, ["--maxmemory-policy", "noeviction"]) as server:
        clock = Clock()
        tier = opened(server.url, clock=clock)
        store(tier, 0)
        raw(server).config_set("maxmemory", 1)
        assert store(tier, 0, 1, 2) == 1
        assert (tier.counters.dropped, tier.counters.failures) == (2, 0)
        assert load(tier, 0) == 1
        raw(server).config_set("maxmemory", 0)
        assert store(tier, 1) == 0  # not tried before the pause is over
        clock.now_s += 1.0
        assert store(tier, 1) == 1


def test_a_flushed_redis_is_a_miss_and_nothing_else(server: RedisServer, opened: Opened) -> None:
    tier = opened(server.url)
    store(tier, 0, 1)
    raw(server).flushall()
    assert tier.present(ids(0, 1)) == 0
    assert load(tier, 0, 1) == 0
    assert tier.counters.failures == 0
    assert not tier.counters.verify_failures


def test_a_closed_tier_has_nothing_and_takes_nothing(server: RedisServer, opened: Opened) -> None:
    tier = opened(server.url)
    store(tier, 0)
    tier.close()
    assert tier.present(ids(0)) == 0
    assert load(tier, 0) == 0
    assert store(tier, 1) == 0


# ---- addresses and secrets


def test_a_password_is_given_and_a_wrong_one_fails_without_being_told(
    tmp_path: Path, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with running_redis(tmp_path, ["--requirepass", SECRET]) as server:
        assert store(opened(f"redis://:{SECRET}@127.0.0.1:{server.port}/0"), 0) == 1
        apart = RedisTier(RedisSettings(server.url, password=SECRET, read_budget_s=GENEROUS_S), FORMAT)
        assert apart.present(ids(0)) == 1
        apart.close()
        tier = opened(f"redis://:{SECRET}-wrong@127.0.0.1:{server.port}/0")
        with pytest.raises(TierFailed) as failed:
            tier.present(ids(0))
        told = f"{failed.value} {failed.value.__cause__!r} {tier!r} {RedisSettings(server.url, SECRET)!r} {tier.link.address}"
        assert SECRET not in told + caplog.text
        assert str(server.port) in failed.value.message


@pytest.mark.parametrize(
    "url", [f"http://:{SECRET}@host/0", f"redis://user:x/{SECRET}@host:6379/0", f"redis://:{SECRET}@host:port/0", ""]
)
def test_an_address_that_is_none_is_refused_without_being_told(url: str) -> None:
    with pytest.raises(ConfigInvalid) as refused:
        RedisTier(RedisSettings(url), FORMAT)
    assert SECRET not in str(refused.value)
    assert refused.value.__suppress_context__


def test_tls_is_spoken_where_the_address_says_so_and_an_unknown_certificate_is_refused(
    tmp_path: Path, opened: Opened
) -> None:
    made = certificates.make(tmp_path)
    with running_redis(tmp_path, tls_files=(made.cert, made.key, made.ca)) as server:
        url = f"rediss://127.0.0.1:{server.port}/0"
        tier = opened(f"{url}?ssl_ca_certs={made.ca}")
        assert store(tier, 0) == 1
        assert load(tier, 0) == 1
        with pytest.raises(TierFailed):
            opened(url).present(ids(0))
