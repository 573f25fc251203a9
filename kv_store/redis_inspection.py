"""Owns what operators see of the Redis tier: a look at all its names, which loads and stores do without."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, cast

from kv_store.inspection import Finding, Occupancy, PageRow
from kv_store.page import PageId
from kv_store.redis_tier import RedisTier
from kv_store.redis_value import HeaderFields, header_bytes, header_failure, header_fields, value_failure
from kv_transfer.keys import HASH_BYTES

if TYPE_CHECKING:
    from redis import Redis

_NAMES_PER_SCAN = 1000
_HEADERS_PER_CALL = 256


class RedisInspection:
    """Implements kv_store.inspection.InspectedTier over a Redis tier. What it finds is there for all workers of the same Redis."""

    name = RedisTier.name

    def __init__(self, tier: RedisTier) -> None:
        self._tier = tier

    def occupancy(self) -> Occupancy:
        """Of the whole Redis, whoever uses it."""
        memory = self._tier.link.operate(lambda redis: cast("dict[str, int]", redis.info("memory")))
        return Occupancy(memory.get("maxmemory", 0), memory["used_memory"], None)

    def keys(self) -> list[bytes]:
        return self._tier.link.operate(lambda redis: list(self._scan(redis)))

    def rows(self, keys: Sequence[bytes], limit: int) -> list[PageRow]:
        """Redis knows no order: without keys, any pages."""
        found: list[PageRow] = []
        wanted = keys or self._tier.link.operate(lambda redis: list(islice(self._scan(redis), limit)))
        for start in range(0, len(wanted), _HEADERS_PER_CALL):
            found += self._rows(wanted[start : start + _HEADERS_PER_CALL])
            if len(found) >= limit:
                break
        return found[:limit]

    def hold(self, key: bytes, seconds: float) -> bool:
        """Redis evicts by its own policy: nothing can be kept from it."""
        return False

    def check(self, key: bytes) -> Finding:
        name = self._name(key)
        value = self._tier.link.operate(lambda redis: cast("bytes | None", redis.get(name)))
        if value is None:
            return "absent"
        failure = value_failure(value, _named(key, header_fields(value, self._tier.format)), self._tier.format)
        if failure is None:
            return "good"
        self._tier.counters.verify_failures[failure] += 1
        self._tier.remove([key])
        return "bad"

    # ---- parts

    def _name(self, key: bytes) -> str:
        return self._tier.prefix + key.hex()

    def _scan(self, redis: Redis) -> Iterator[bytes]:
        """Keys of the names that are ours. One may come twice, as Redis says of SCAN."""
        seen: set[bytes] = set()
        prefix = self._tier.prefix.encode()
        for name in redis.scan_iter(match=f"{self._tier.prefix}*", count=_NAMES_PER_SCAN):
            key = _key_of(cast("bytes", name)[len(prefix) :])
            if key is not None and key not in seen:
                seen.add(key)
                yield key

    def _rows(self, keys: Sequence[bytes]) -> list[PageRow]:
        page_format, start = self._tier.format, header_bytes(self._tier.format)

        def headers(redis: Redis) -> list[bytes]:
            pipeline = redis.pipeline(transaction=False)
            for key in keys:
                pipeline.getrange(self._name(key), 0, start - 1)
            return cast("list[bytes]", pipeline.execute(raise_on_error=False))

        now_s, rows = time.time(), []
        for key, header in zip(keys, self._tier.link.operate(headers), strict=True):
            fields = header_fields(header, page_format) if isinstance(header, bytes) else None
            page_id = _named(key, fields)
            if fields is None or header_failure(header, page_id, page_format) is not None:
                continue
            rows.append(PageRow(page_id, b"", start + fields.payload_bytes, max(0.0, now_s - fields.stored_s)))
        return rows


def _named(key: bytes, fields: HeaderFields | None) -> PageId:
    """The page that lies under `key`, by its own word. Whatever it is where there is no header, that is no page."""
    return replace(fields.page_id, key=key) if fields is not None else PageId(key, 0, b"")


def _key_of(name: bytes) -> bytes | None:
    try:
        key = bytes.fromhex(name.decode())
    except ValueError:
        return None
    return key if len(key) == HASH_BYTES else None
