"""What a store of the format before left behind is no page and no damage: it is not looked at, and leaves when room is needed."""

from __future__ import annotations

from pathlib import Path

import redis

from kv_store.redis_link import RedisSettings
from kv_store.redis_tier import RedisTier
from tests.kv_store import format_one
from tests.kv_store.chains import SMALL, bytes_of, key_of, page_of
from tests.kv_store.redis_server import RedisServer
from tests.kv_store.test_real_disks import LIMITS, posix_tier

OLD = range(format_one.PAGES)
NEW = range(100, 140)  # more than there is room for


def file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_disk_of_the_format_before_is_empty_counts_nothing_and_gives_its_room(tmp_path: Path) -> None:
    format_one.unpack_disk(tmp_path)
    old = tmp_path / format_one.DIGEST
    assert len(list(old.glob("segment-*"))) == 2
    tier = posix_tier(tmp_path)
    assert [tier.present([page_of(number).id]) for number in OLD] == [0] * len(OLD)
    assert tier.read([page_of(0).id], [SMALL.empty()]) == 0
    assert (tier.used_bytes(), len(tier.entries()), tier.counters.misses) == (0, 0, 1)
    assert tier.write([page_of(0)], [bytes_of(0)]) == 1
    assert old.exists()
    for number in NEW:
        assert tier.write([page_of(number)], [bytes_of(number)]) == 1
        assert file_bytes(tmp_path) <= LIMITS.capacity_bytes
    assert not list(old.glob("segment-*"))
    counters, held = tier.counters, len(tier.entries())
    assert (counters.stored, counters.evicted) == (1 + len(NEW), 1 + len(NEW) - held)
    assert (counters.dropped, counters.failures, counters.verify_failures.total()) == (0, 0, 0)
    tier.close()
    again = posix_tier(tmp_path)
    assert len(again.entries()) == held
    assert again.counters.verify_failures.total() == 0
    again.close()


def test_a_value_of_the_format_before_is_not_looked_at_and_stays_until_its_time(server: RedisServer) -> None:
    client = redis.Redis(port=server.port, protocol=2)
    name = f"pdserve:kv:{format_one.DIGEST}:{key_of(0).hex()}"
    client.set(name, format_one.redis_value())
    tier = RedisTier(RedisSettings(server.url, read_budget_s=60.0), SMALL)
    assert tier.present([page_of(0).id]) == 0
    assert tier.write([page_of(0)], [bytes_of(0)]) == 1
    into = SMALL.empty()
    assert tier.read([page_of(0).id], [into]) == 1
    assert (into == bytes_of(0)).all()
    assert (tier.counters.stored, tier.counters.verify_failures.total()) == (1, 0)
    assert client.get(name) == format_one.redis_value()
    tier.close()
