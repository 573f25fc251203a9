"""What the tests of the Redis tier share: pages by number, a clock, and what else may be done to the same Redis."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import numpy as np
import redis

from kv_store.page import Page, PageBytes, PageFormat, PageId
from kv_store.redis_tier import RedisTier
from tests.kv_store.redis_server import RedisServer

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
    tokens = array("i", range(number * 1000, number * 1000 + FORMAT.page_tokens)).tobytes()
    return Page(PageId(bytes([number]) * 32, 77 + number, tokens), bytes([number - 1]) * 32 if number else b"")


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


def raw(server: RedisServer) -> redis.Redis:
    """What an operator, or another program, does to the same Redis."""
    return redis.Redis(port=server.port, protocol=2)


def name_of(number: int, page_format: PageFormat = FORMAT) -> str:
    return f"pdserve:kv:{page_format.digest().hex()}:{page_of(number).id.key.hex()}"


Opened = Callable[..., RedisTier]
