"""Owns the way to Redis: two connections with time limits of their own, and the breaker. The one home of `redis`.

Loads are on the way of a request: what is asked for with a deadline ends by then whatever Redis does, and after a failure nothing goes
out until the breaker's pause is over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kv_store.backoff import Backoff
from kv_store.breaker import Breaker
from kv_store.tier import TierCounters, TierFailed
from pdserve.errors import ConfigInvalid

READ_BUDGET_S = 0.1
WRITE_TIMEOUT_S = 1.0  # of one answer
READ_THREADS = 4

Refused = redis.ResponseError  # Redis answers one command with it, also inside a pipeline

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class RedisSettings:
    """url: redis://, rediss:// (TLS) or unix://; it and `password` are never logged."""

    url: str = field(repr=False)
    password: str = field(default="", repr=False)
    ttl_s: float = 86_400.0
    prefix: str = "pdserve:kv"
    read_budget_s: float = READ_BUDGET_S


class RedisLink:
    """Thread-safe. counters: only `failures` are counted here. Every call that fails raises TierFailed."""

    def __init__(
        self, settings: RedisSettings, backoff: Backoff, counters: TierCounters, clock: Callable[[], float]
    ) -> None:
        self.reader = _client(settings, settings.read_budget_s)
        self.writer = _client(settings, WRITE_TIMEOUT_S)
        self.address = _address(self.reader)
        self._counters = counters
        self._clock = clock
        self._lock = threading.Lock()
        self._breaker = Breaker(backoff)
        self._closed = False
        self._threads = ThreadPoolExecutor(READ_THREADS, "kv-redis")

    def admits(self) -> bool:
        """Whether Redis may be asked now. Whoever is let in says `worked` at the end, unless a call failed."""
        with self._lock:
            return not self._closed and self._breaker.admits(self._clock())

    def worked(self) -> None:
        with self._lock:
            self._breaker.worked()

    def ask(self, call: Callable[[], Answer], deadline_s: float) -> Answer:
        """Its answer, in time: time limits of sockets are for one piece of an answer only."""
        future = self._threads.submit(call)
        return self.direct(lambda: future.result(max(0.0, deadline_s - self._clock())))

    def direct(self, call: Callable[[], Answer]) -> Answer:
        try:
            return call()
        except (redis.RedisError, OSError, TimeoutError, CancelledError) as error:
            with self._lock:
                self._breaker.failed(self._clock())
                self._counters.failures += 1
            raise TierFailed(f"Redis at {self.address} failed ({type(error).__name__}).") from error

    def operate(self, call: Callable[[redis.Redis], Answer]) -> Answer:
        """For operators: beside the loads, with the time limits of saves. Raises TierFailed also while Redis is left alone."""
        if not self.admits():
            raise TierFailed(f"Redis at {self.address} failed a moment ago and is left alone.")
        answer = self.direct(lambda: call(self.writer))
        self.worked()
        return answer

    def close(self) -> None:
        self._closed = True
        self.reader.connection_pool.disconnect()  # ends what the threads wait for
        self.writer.connection_pool.disconnect()
        self._threads.shutdown(wait=False, cancel_futures=True)


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
