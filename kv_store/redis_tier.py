"""Owns the Redis tier: pages that workers share, one Redis value each. The one home of `redis`.

It has no index of its own: what Redis has is there, and Redis evicts by its own policy, so nothing is told to a listener. Loads are
on the way of a request: a call that looks or reads ends within its budget whatever Redis does, and after a failure none goes out
until the breaker's pause is over. Saves have connections and time limits of their own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kv_store.backoff import Backoff
from kv_store.breaker import Breaker
from kv_store.page import Page, PageBytes, PageFormat, PageId
from kv_store.redis_value import HEADER_BYTES, copy_payload, header_failure, pack_value, value_failure
from kv_store.tier import TierCounters, TierFailed, VerifyFailure
from pdserve.errors import ConfigInvalid

READ_BUDGET_S = 0.1
WRITE_TIMEOUT_S = 1.0  # of one answer
READ_BYTES = 4 * 2**20  # of one MGET: what is asked for at once must arrive within the budget
WRITE_BYTES = 8 * 2**20  # of one pipeline
HEADERS_PER_CALL = 64
READ_THREADS = 4

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class RedisSettings:
    """url: redis://, rediss:// (TLS) or unix://; it and `password` are never logged."""

    url: str = field(repr=False)
    password: str = field(default="", repr=False)
    ttl_s: float = 86_400.0
    prefix: str = "pdserve:kv"
    read_budget_s: float = READ_BUDGET_S


class RedisTier:
    """Implements kv_store.tier.PageTier. While the breaker is open everything is absent and nothing is stored."""

    name = "redis"

    def __init__(
        self,
        settings: RedisSettings,
        page_format: PageFormat,
        backoff: Callable[[], Backoff] = Backoff,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters = TierCounters()
        self.reader = _client(settings, settings.read_budget_s)
        self.writer = _client(settings, WRITE_TIMEOUT_S)
        self.address = _address(self.reader)
        self._settings = settings
        self.format = page_format
        self.prefix = f"{settings.prefix}:{page_format.digest().hex()}:"
        self._clock = clock
        self._lock = threading.Lock()
        self._breaker = Breaker(backoff())  # Redis does not answer
        self._refusal = backoff()  # Redis answers, and does not store: it is full, or read-only
        self._closed = False
        self._threads = ThreadPoolExecutor(READ_THREADS, "kv-redis")

    def present(self, ids: Sequence[PageId]) -> int:
        if not ids or not self._admitted():
            return 0
        deadline_s, found = self._clock() + self._settings.read_budget_s, 0
        for some in _batches(ids, HEADERS_PER_CALL):
            try:
                here = self._ask(partial(self._here, self.reader, some), deadline_s)
            except TierFailed:
                if not found:
                    raise
                return found
            found += here.index(False) if False in here else len(some)
            if False in here:
                break
        self._worked()
        return found

    def read(self, ids: Sequence[PageId], into: Sequence[PageBytes]) -> int:
        started_s, good = self._clock(), 0
        try:
            if ids and self._admitted():
                good = self._read(ids, into, started_s + self._settings.read_budget_s)
        finally:
            with self._lock:
                self.counters.hits += good
                self.counters.misses += len(ids) - good
                self.counters.bytes_out += good * self.format.size_bytes
                self.counters.read_s += self._clock() - started_s
        return good

    def write(self, pages: Sequence[Page], contents: Sequence[PageBytes]) -> int:
        started_s, here = self._clock(), 0
        per_batch = max(1, WRITE_BYTES // self.format.size_bytes)
        try:
            if pages and self._admitted():
                for some in _batches(list(zip(pages, contents, strict=True)), per_batch):
                    here += self._direct(partial(self._store, some))
                self._worked()
        finally:
            with self._lock:
                self.counters.dropped += len(pages) - here
                self.counters.write_s += self._clock() - started_s
        return here

    def remove(self, keys: Sequence[bytes]) -> int:
        if not keys or not self._admitted():
            return 0
        removed = self._direct(lambda: self.writer.unlink(*map(self._name, keys)))
        self._worked()
        return removed

    def used_bytes(self) -> int:
        """What Redis uses in all, for whomever; 0 while it is not reachable."""
        if not self._admitted():
            return 0
        try:
            memory = self._ask(
                lambda: cast("dict[str, int]", self.reader.info("memory")),
                self._clock() + self._settings.read_budget_s,
            )
        except TierFailed:
            return 0
        self._worked()
        return memory["used_memory"]

    def operate(self, call: Callable[[redis.Redis], Answer]) -> Answer:
        """For operators: beside the loads, with the time limits of saves. Raises TierFailed, also while Redis is left alone."""
        if not self._admitted():
            raise TierFailed(f"Redis at {self.address} failed a moment ago and is left alone.")
        answer = self._direct(lambda: call(self.writer))
        self._worked()
        return answer

    def close(self) -> None:
        self._closed = True
        self.reader.connection_pool.disconnect()  # ends what the threads wait for
        self.writer.connection_pool.disconnect()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ---- parts

    def _name(self, key: bytes) -> str:
        return self.prefix + key.hex()

    def _here(self, client: redis.Redis, ids: Sequence[PageId]) -> list[bool]:
        """Which pages are there, by their headers. What lies under their names and is no page is dropped."""
        if not ids:
            return []
        pipeline = client.pipeline(transaction=False)
        for page_id in ids:
            pipeline.getrange(self._name(page_id.key), 0, HEADER_BYTES - 1)
        here: list[bool] = []
        for page_id, answer in zip(ids, pipeline.execute(raise_on_error=False), strict=True):
            failure = None if answer == b"" else self._failure(answer, page_id)
            if failure is not None:
                self._refuse(client, page_id, failure)
            here.append(answer != b"" and failure is None)
        return here

    def _failure(self, answer: object, page_id: PageId) -> VerifyFailure | None:
        if isinstance(answer, bytes):
            return header_failure(answer, page_id, self.format)
        if isinstance(answer, redis.ResponseError) and not str(answer).startswith("WRONGTYPE"):
            raise answer
        return "header"  # a list or a hash under our name

    def _refuse(self, client: redis.Redis, page_id: PageId, failure: VerifyFailure) -> None:
        """Counts what is not the page that is meant. A good page of other tokens under the same key stays."""
        with self._lock:
            self.counters.verify_failures[failure] += 1
        if failure != "fingerprint":
            client.unlink(self._name(page_id.key))

    def _read(self, ids: Sequence[PageId], into: Sequence[PageBytes], deadline_s: float) -> int:
        """Raises TierFailed only where nothing was read."""
        good, per_call = 0, max(1, READ_BYTES // self.format.size_bytes)
        try:
            for some in _batches(ids, per_call):
                values = self._ask(partial(self._values, some), deadline_s)
                for value in values:
                    copy_payload(value, self.format, into[good])
                    good += 1
                if len(values) < len(some):
                    break
        except TierFailed:
            if not good:
                raise
            return good
        self._worked()
        return good

    def _values(self, ids: Sequence[PageId]) -> list[bytes]:
        """The verified values of `ids`, until one is absent or bad, which is dropped."""
        answers = cast("list[bytes | None]", self.reader.mget([self._name(page_id.key) for page_id in ids]))
        values: list[bytes] = []
        for page_id, value in zip(ids, answers, strict=True):
            if value is None:
                break
            failure = value_failure(value, page_id, self.format)
            if failure is not None:
                self._refuse(self.reader, page_id, failure)
                break
            values.append(value)
        return values

    def _store(self, batch: Sequence[tuple[Page, PageBytes]]) -> int:
        """How many of them are there afterwards."""
        here = self._here(self.writer, [page.id for page, _ in batch])
        absent = [each for each, present in zip(batch, here, strict=True) if not present]
        with self._lock:
            refused = self._refusal.off(self._clock())
        if not absent or refused:
            return sum(here)
        pipeline = self.writer.pipeline(transaction=False)
        stored_s, ttl_ms = time.time(), max(1, int(self._settings.ttl_s * 1e3))
        for page, content in absent:
            value = memoryview(pack_value(page.id, self.format, content, stored_s))
            pipeline.set(self._name(page.id.key), value, nx=True, px=ttl_ms)
        answers = pipeline.execute(raise_on_error=False)
        stored = sum(answer is True for answer in answers)
        with self._lock:
            self.counters.stored += stored
            self.counters.bytes_in += stored * self.format.size_bytes
            if any(isinstance(answer, redis.ResponseError) for answer in answers):
                self._refusal.failed(self._clock())
            else:
                self._refusal.worked()
        taken = [page.id for (page, _), answer in zip(absent, answers, strict=True) if answer is None]
        return sum(here) + stored + sum(self._here(self.writer, taken))

    def _admitted(self) -> bool:
        with self._lock:
            return not self._closed and self._breaker.admits(self._clock())

    def _worked(self) -> None:
        with self._lock:
            self._breaker.worked()

    def _ask(self, call: Callable[[], Answer], deadline_s: float) -> Answer:
        """Its answer, in time: time limits of sockets are for one piece of an answer only. Raises TierFailed."""
        future = self._threads.submit(call)
        return self._direct(lambda: future.result(max(0.0, deadline_s - self._clock())))

    def _direct(self, call: Callable[[], Answer]) -> Answer:
        try:
            return call()
        except (redis.RedisError, OSError, TimeoutError, CancelledError) as error:
            with self._lock:
                self._breaker.failed(self._clock())
                self.counters.failures += 1
            raise TierFailed(f"Redis at {self.address} failed ({type(error).__name__}).") from error


def _client(settings: RedisSettings, timeout_s: float) -> redis.Redis:
    """Connects at its first command. Nothing is tried twice: the breaker decides that."""
    password = {"password": settings.password} if settings.password else {}
    try:
        pool = redis.ConnectionPool.from_url(
            settings.url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            socket_read_size=2**18,
            retry=Retry(NoBackoff(), 0),
            protocol=2,  # RESP2: a connection needs no greeting
            **password,
        )
    except (ValueError, redis.RedisError):
        # Without its cause: that may quote the password.
        raise ConfigInvalid(
            "store.redis_url is no address of Redis: use redis://HOST:PORT/DB or rediss://..."
        ) from None
    return redis.Redis(connection_pool=pool)


def _address(client: redis.Redis) -> str:
    """For messages: without user and password."""
    settings = client.connection_pool.connection_kwargs
    if "path" in settings:
        return str(settings["path"])
    return f"{settings.get('host', 'localhost')}:{settings.get('port', 6379)}/{settings.get('db', 0)}"


Item = TypeVar("Item")


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
