"""Operators' commands on real tiers: bounded, cut where they take too long, gone on with where they were cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kv_store.redis_link import RedisSettings
from kv_store.redis_tier import RedisTier
from kv_store.tier import PageTier
from kv_transfer.keys import HASH_BYTES
from pdserve.errors import InvalidRequest
from pdserve.v1 import worker_pb2
from tests.kv_store.chains import SMALL, key_of, page_of
from tests.kv_store.test_tier_contract import open_disk, open_host, read, write
from worker_runtime.kv_commands import Bounds, carry_out, open_tiers

Command = worker_pb2.KvCommand


def stopped_clock() -> float:
    return 5.0


@pytest.fixture
def tiers(tmp_path: Path) -> Iterator[list[PageTier]]:
    opened = [open_host(tmp_path, lambda change, pages: None), open_disk(tmp_path, lambda change, pages: None)]
    yield opened
    for tier in opened:
        tier.close()


def done(
    tiers: list[PageTier],
    action: Command.Action.ValueType,
    *keys: bytes,
    clock: Callable[[], float] = stopped_clock,
    limit: int = 0,
    names: tuple[str, ...] = (),
    hold_ms: int = 0,
    max_bytes: int = 0,
    after: bytes = b"",
) -> worker_pb2.KvAnswer:
    command = Command(
        action=action, keys=b"".join(keys), limit=limit, tiers=names, hold_ms=hold_ms, max_bytes=max_bytes, after=after
    )
    return carry_out(command, open_tiers(tiers), Bounds(SMALL.size_bytes, clock), 5.0)


def test_a_list_tells_pages_of_every_tier_and_is_bounded_in_each(tiers: list[PageTier]) -> None:
    for tier in tiers:
        write(tier, range(8))
    pages = done(tiers, Command.ACTION_LIST, limit=3).pages
    assert [page.tier for page in pages] == ["host"] * 3 + ["disk"] * 3
    (page,) = done(tiers, Command.ACTION_LIST, key_of(5), names=("disk",)).pages
    assert (page.key, page.parent) == (key_of(5), key_of(4))
    assert page.bytes >= SMALL.size_bytes


def test_a_pin_keeps_pages_until_it_is_let_go(tiers: list[PageTier]) -> None:
    host = tiers[:1]
    write(host[0], [0, 1])
    answer = done(host, Command.ACTION_PIN, key_of(0), key_of(99), hold_ms=60_000)
    assert [(outcome.tier, outcome.pages) for outcome in answer.outcomes] == [("host", 1)]
    write(host[0], range(100, 260, 4))
    (page,) = done(host, Command.ACTION_LIST, key_of(0), key_of(1)).pages
    assert page.key == key_of(0)
    assert page.held_s > 0
    done(host, Command.ACTION_PIN, key_of(0), hold_ms=0)
    write(host[0], range(300, 460, 4))
    assert not done(host, Command.ACTION_LIST, key_of(0)).pages


def test_a_flush_drops_the_named_pages_or_all(tiers: list[PageTier]) -> None:
    for tier in tiers:
        write(tier, range(6))
    some = done(tiers, Command.ACTION_FLUSH, key_of(0), key_of(1), key_of(99))
    assert [(each.tier, each.pages) for each in some.outcomes] == [("host", 2), ("disk", 2)]
    everything = done(tiers, Command.ACTION_FLUSH, names=("disk",))
    assert [(each.tier, each.pages, each.cut) for each in everything.outcomes] == [("disk", 4, False)]
    assert read(tiers[0], range(2, 6)) == 4
    assert not tiers[1].used_bytes()


def damage(folder: Path, number: int) -> None:
    for segment in folder.rglob("segment-*"):
        data = bytearray(segment.read_bytes())
        at = data.find(key_of(number))
        assert at > 0
        data[at + HASH_BYTES + 1] ^= 4
        segment.write_bytes(data)


def test_a_verify_finds_the_damaged_page_and_only_that(tiers: list[PageTier], tmp_path: Path) -> None:
    for tier in tiers:
        write(tier, [0, 1, 2])
    damage(tmp_path, 1)
    host, disk = done(tiers, Command.ACTION_VERIFY).outcomes
    assert (host.pages, host.bad, host.bad_keys, host.cut) == (3, 0, b"", False)
    assert (disk.pages, disk.bad, disk.bad_keys) == (2, 1, key_of(1))
    assert disk.bytes == 3 * SMALL.size_bytes
    assert done(tiers, Command.ACTION_VERIFY, names=("disk",)).outcomes[0].bad == 0


def test_a_verify_that_is_cut_goes_on_where_it_stopped_and_sees_every_page_once(tiers: list[PageTier]) -> None:
    write(tiers[0], range(6))
    seen, after = 0, b""
    for _ in range(3):
        (outcome,) = done(tiers[:1], Command.ACTION_VERIFY, max_bytes=2 * SMALL.size_bytes, after=after).outcomes
        seen += outcome.pages
        after = outcome.last_key
    assert seen == 6
    assert not outcome.cut
    assert len({page_of(number).id.key for number in range(6)}) == seen


def test_a_verify_past_its_deadline_still_checks_one_page_and_says_that_it_was_cut(tiers: list[PageTier]) -> None:
    write(tiers[0], range(3))
    (outcome,) = done(tiers[:1], Command.ACTION_VERIFY, clock=lambda: 100.0).outcomes
    assert (outcome.pages, outcome.cut, outcome.last_key) == (1, True, min(key_of(number) for number in range(3)))


def test_a_tier_that_fails_says_why_and_the_others_answer(tiers: list[PageTier]) -> None:
    write(tiers[0], [0])
    dead = RedisTier(RedisSettings("redis://127.0.0.1:1/0"), SMALL)
    host, redis = done([tiers[0], dead], Command.ACTION_VERIFY).outcomes
    dead.close()
    assert (host.pages, host.failure) == (1, "")
    assert "Redis" in redis.failure


@pytest.mark.parametrize(
    "command",
    [
        Command(action=Command.ACTION_LIST, keys=b"short"),
        Command(action=Command.ACTION_PIN, hold_ms=1),
        Command(action=Command.ACTION_VERIFY, keys=bytes(HASH_BYTES * 10_001)),
        Command(),
    ],
)
def test_malformed_commands_are_refused(command: Command, tiers: list[PageTier]) -> None:
    with pytest.raises(InvalidRequest):
        carry_out(command, open_tiers(tiers), Bounds(SMALL.size_bytes, stopped_clock), 5.0)
