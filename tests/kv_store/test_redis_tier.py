"""The Redis tier against a real redis-server: what it stores, and what lies under its names and is no page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from kv_store.page import Page
from kv_store.redis_link import RedisSettings
from kv_store.redis_tier import RedisTier
from kv_store.redis_value import header_bytes
from tests.kv_store.redis_rig import FORMAT, OTHER_MODEL, Opened, content_of, ids, load, name_of, page_of, raw, store
from tests.kv_store.redis_server import RedisServer

HEADER = header_bytes(FORMAT)


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


@pytest.mark.parametrize("at", [*range(0, HEADER, 7), HEADER, HEADER + 600, -1])
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
    return value[: HEADER - 1]


def longer(value: bytes, other: bytes) -> bytes:
    return value + b"\0"


def with_the_payload_of_another(value: bytes, other: bytes) -> bytes:
    return value[:HEADER] + other[HEADER:]


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
    other = replace(page_of(0).id, tokens=page_of(1).id.tokens)
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
