"""The Redis tier against a real redis-server: what it stores, and every way in which Redis fails."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import redis

from kv_store.backoff import Backoff
from kv_store.page import Page, PageBytes, PageFormat, PageId
from kv_store.redis_link import RedisSettings
from kv_store.redis_tier import RedisTier
from kv_store.redis_value import HEADER_BYTES
from kv_store.tier import TierFailed
from pdserve.errors import ConfigInvalid
from tests.kv_store.redis_server import RedisServer, running_redis
from tests.service_kit import certificates

FORMAT = PageFormat(identity=b"\x31" * 32, page_tokens=16, layers=2, block_bytes=512)
OTHER_MODEL = PageFormat(identity=b"\x32" * 32, page_tokens=16, layers=2, block_bytes=512)
SECRET = "hunter2-secret"
LONGEST_S = 60.0
GENEROUS_S = 20.0  # for tests that do not ask how long a call takes


class Clock:
    """Time that passes only when told: pauses of the breaker take none."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def page_of(number: int) -> Page:
    return Page(PageId(bytes([number]) * 32, 77 + number), bytes([number - 1]) * 32 if number else b"")


def content_of(number: int) -> PageBytes:
    return np.random.default_rng(number).integers(0, 256, (FORMAT.layers, FORMAT.block_bytes), dtype=np.uint8)


def ids(*numbers: int) -> list[PageId]:
    return [page_of(number).id for number in numbers]


def store(tier: RedisTier, *numbers: int) -> int:
    return tier.write([page_of(number) for number in numbers], [content_of(number) for number in numbers])


def load(tier: RedisTier, *numbers: int) -> int:
    """How many were read; those are compared byte by byte."""
    into = [FORMAT.empty() for _ in numbers]
    good = tier.read(ids(*numbers), into)
    for number, content in zip(numbers[:good], into, strict=False):
        assert np.array_equal(content, content_of(number))
    return good


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    raw(shared_server).flushall()
    return shared_server


def raw(server: RedisServer) -> redis.Redis:
    """What an operator, or another program, does to the same Redis."""
    return redis.Redis(port=server.port, protocol=2)


def name_of(number: int, page_format: PageFormat = FORMAT) -> str:
    return f"pdserve:kv:{page_format.digest().hex()}:{page_of(number).id.key.hex()}"


Opened = Callable[..., RedisTier]


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


# ---- what it stores


def test_pages_that_are_stored_come_back_to_another_worker(server: RedisServer, opened: Opened) -> None:
    assert store(opened(server.url), 0, 1, 2) == 3
    other = opened(server.url)
    assert other.present(ids(0, 1, 2, 3)) == 3
    assert load(other, 0, 1, 2, 3) == 3
    assert (other.counters.hits, other.counters.misses) == (3, 1)


def test_a_value_lies_under_its_format_and_key_and_ends_with_its_time(server: RedisServer, opened: Opened) -> None:
    store(opened(server.url), 4)
    client = raw(server)
    assert client.keys() == [name_of(4).encode()]
    assert 86_000_000 < client.pttl(name_of(4)) <= 86_400_000


def test_a_page_that_is_there_is_not_sent_again(server: RedisServer, opened: Opened) -> None:
    first, second = opened(server.url), opened(server.url)
    store(first, 0)
    before = raw(server).get(name_of(0))
    assert store(second, 0, 1) == 2
    assert raw(server).get(name_of(0)) == before
    assert second.counters.stored == 1
    assert second.counters.dropped == 0


def test_looking_stops_at_the_first_gap(server: RedisServer, opened: Opened) -> None:
    tier = opened(server.url)
    numbers = [number for number in range(200) if number != 150]
    store(tier, *numbers)
    assert tier.present(ids(*range(200))) == 150
    assert tier.present(ids(*range(100, 150))) == 50
    assert tier.present([]) == 0


def test_reads_of_more_than_one_answer_go_on_where_the_last_one_ended(
    server: RedisServer, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kv_store.redis_tier.READ_BYTES", 3 * FORMAT.size_bytes)
    monkeypatch.setattr("kv_store.redis_tier.WRITE_BYTES", 4 * FORMAT.size_bytes)
    tier = opened(server.url)
    assert store(tier, *range(11)) == 11
    assert load(tier, *range(11)) == 11
    raw(server).delete(name_of(7))
    assert load(tier, *range(11)) == 7


def test_rows_that_lie_apart_are_stored_and_filled(server: RedisServer, opened: Opened) -> None:
    tier = opened(server.url)
    arena = np.zeros((FORMAT.layers, 4, FORMAT.block_bytes), dtype=np.uint8)
    arena[:, 1] = content_of(9)
    assert tier.write([page_of(9)], [arena[:, 1]]) == 1
    assert tier.read(ids(9), [arena[:, 3]]) == 1
    assert np.array_equal(arena[:, 3], content_of(9))


def test_removed_pages_are_gone_for_all(server: RedisServer, opened: Opened) -> None:
    tier = opened(server.url)
    store(tier, 0, 1)
    assert tier.remove([page_of(0).id.key, page_of(5).id.key]) == 1
    assert opened(server.url).present(ids(0)) == 0
    assert tier.used_bytes() > 0


# ---- values that are not what their name says


def flipped(value: bytes, at: int) -> bytes:
    return value[:at] + bytes([value[at] ^ 0x10]) + value[at + 1 :]


@pytest.mark.parametrize("at", [*range(0, HEADER_BYTES, 7), HEADER_BYTES, HEADER_BYTES + 600, -1])
def test_a_flipped_bit_anywhere_is_a_miss_and_the_value_goes(server: RedisServer, opened: Opened, at: int) -> None:
    tier = opened(server.url)
    store(tier, 0)
    value = raw(server).get(name_of(0))
    assert isinstance(value, bytes)
    raw(server).set(name_of(0), flipped(value, at % len(value)))
    assert load(tier, 0) == 0
    assert sum(tier.counters.verify_failures.values()) == 1
    assert raw(server).exists(name_of(0)) == 0
    assert store(tier, 0) == 1
    assert load(tier, 0) == 1


def as_whole(value: bytes, other: bytes) -> bytes:
    return other


def cut_in_the_payload(value: bytes, other: bytes) -> bytes:
    return value[:-1]


def cut_in_the_header(value: bytes, other: bytes) -> bytes:
    return value[: HEADER_BYTES - 1]


def longer(value: bytes, other: bytes) -> bytes:
    return value + b"\0"


def with_the_payload_of_another(value: bytes, other: bytes) -> bytes:
    return value[:HEADER_BYTES] + other[HEADER_BYTES:]


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        (as_whole, "identity"),
        (cut_in_the_payload, "length"),
        (cut_in_the_header, "length"),
        (longer, "length"),
        (with_the_payload_of_another, "checksum"),
    ],
)
def test_a_value_that_is_not_what_its_name_says_is_counted_by_kind_and_dropped(
    server: RedisServer, opened: Opened, changed: Callable[[bytes, bytes], bytes], kind: str
) -> None:
    tier = opened(server.url)
    store(tier, 0, 1)
    value, other = raw(server).get(name_of(0)), raw(server).get(name_of(1))
    assert isinstance(value, bytes)
    assert isinstance(other, bytes)
    raw(server).set(name_of(0), changed(value, other))
    assert load(tier, 0, 1) == 0
    assert dict(tier.counters.verify_failures) == {kind: 1}
    assert raw(server).exists(name_of(0)) == 0
    assert load(tier, 1) == 1


def test_a_page_of_another_model_under_the_right_name_is_no_page(server: RedisServer, opened: Opened) -> None:
    foreign = RedisTier(RedisSettings(server.url), OTHER_MODEL)
    foreign.write([page_of(0)], [content_of(0)])
    foreign.close()
    tier = opened(server.url)
    assert tier.present(ids(0)) == 0
    raw(server).rename(name_of(0, OTHER_MODEL), name_of(0))
    assert tier.present(ids(0)) == 0
    assert dict(tier.counters.verify_failures) == {"identity": 1}


def test_equal_keys_with_unequal_tokens_are_two_pages(server: RedisServer, opened: Opened) -> None:
    tier = opened(server.url)
    store(tier, 0)
    other = PageId(page_of(0).id.key, 1)
    assert tier.present([other]) == 0
    assert tier.write([Page(other)], [content_of(1)]) == 0
    assert load(tier, 0) == 1
    assert list(tier.counters.verify_failures) == ["fingerprint"]


def test_something_else_under_our_name_is_a_miss(server: RedisServer, opened: Opened) -> None:
    tier = opened(server.url)
    raw(server).rpush(name_of(0), "a list")
    assert tier.present(ids(0)) == 0
    assert store(tier, 0) == 1
    assert load(tier, 0) == 1


# ---- Redis that fails


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
