"""Owns the Redis tier: pages that workers share, one Redis value each.

It has no index of its own: what Redis has is there, and Redis evicts by its own policy, so nothing is told to a listener. A call that
looks or reads ends within its budget; saves have connections and time limits of their own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

from kv_store.backoff import Backoff
from kv_store.page import Page, PageBytes, PageFormat, PageId
from kv_store.redis_link import RedisLink, RedisSettings, Refused
from kv_store.redis_value import copy_payload, header_bytes, header_failure, pack_value, value_failure
from kv_store.tier import TierCounters, TierFailed, VerifyFailure

if TYPE_CHECKING:
    from redis import Redis

READ_BYTES = 4 * 2**20  # of one MGET: what is asked for at once must arrive within the budget
WRITE_BYTES = 8 * 2**20  # of one pipeline
HEADERS_PER_CALL = 64


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
        self.link = RedisLink(settings, backoff(), self.counters, clock)
        self._settings = settings
        self.format = page_format
        self.prefix = f"{settings.prefix}:{page_format.digest().hex()}:"
        self._clock = clock
        self._lock = threading.Lock()
        self._refusal = backoff()  # Redis answers, and does not store: it is full, or read-only

    def present(self, ids: Sequence[PageId]) -> int:
        if not ids or not self.link.admits():
            return 0
        deadline_s, found = self._clock() + self._settings.read_budget_s, 0
        for some in _batches(ids, HEADERS_PER_CALL):
            try:
                here = self.link.ask(partial(self._here, self.link.reader, some), deadline_s)
            except TierFailed:
                if not found:
                    raise
                return found
            found += here.index(False) if False in here else len(some)
            if False in here:
                break
        self.link.worked()
        return found

    def read(self, ids: Sequence[PageId], into: Sequence[PageBytes]) -> int:
        started_s, good = self._clock(), 0
        try:
            if ids and self.link.admits():
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
            if pages and self.link.admits():
                for some in _batches(list(zip(pages, contents, strict=True)), per_batch):
                    here += self.link.direct(partial(self._store, some))
                self.link.worked()
        finally:
            with self._lock:
                self.counters.dropped += len(pages) - here
                self.counters.write_s += self._clock() - started_s
        return here

    def remove(self, keys: Sequence[bytes]) -> int:
        if not keys or not self.link.admits():
            return 0
        removed = self.link.direct(lambda: self.link.writer.unlink(*map(self._name, keys)))
        self.link.worked()
        return removed

    def used_bytes(self) -> int:
        """What Redis uses in all, for whomever; 0 while it is not reachable."""
        if not self.link.admits():
            return 0
        try:
            memory = self.link.ask(
                lambda: cast("dict[str, int]", self.link.reader.info("memory")),
                self._clock() + self._settings.read_budget_s,
            )
        except TierFailed:
            return 0
        self.link.worked()
        return memory["used_memory"]

    def close(self) -> None:
        self.link.close()

    # ---- parts

    def _name(self, key: bytes) -> str:
        return self.prefix + key.hex()

    def _here(self, client: Redis, ids: Sequence[PageId]) -> list[bool]:
        """Which pages are there, by their headers. What lies under their names and is no page is dropped."""
        if not ids:
            return []
        pipeline, last = client.pipeline(transaction=False), header_bytes(self.format) - 1
        for page_id in ids:
            pipeline.getrange(self._name(page_id.key), 0, last)
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
        if isinstance(answer, Refused) and not str(answer).startswith("WRONGTYPE"):
            raise answer
        return "header"  # a list or a hash under our name

    def _refuse(self, client: Redis, page_id: PageId, failure: VerifyFailure) -> None:
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
                values = self.link.ask(partial(self._values, some), deadline_s)
                for value in values:
                    copy_payload(value, self.format, into[good])
                    good += 1
                if len(values) < len(some):
                    break
        except TierFailed:
            if not good:
                raise
            return good
        self.link.worked()
        return good

    def _values(self, ids: Sequence[PageId]) -> list[bytes]:
        """The verified values of `ids`, until one is absent or bad, which is dropped."""
        answers = cast("list[bytes | None]", self.link.reader.mget([self._name(page_id.key) for page_id in ids]))
        values: list[bytes] = []
        for page_id, value in zip(ids, answers, strict=True):
            if value is None:
                break
            failure = value_failure(value, page_id, self.format)
            if failure is not None:
                self._refuse(self.link.reader, page_id, failure)
                break
            values.append(value)
        return values

    def _store(self, batch: Sequence[tuple[Page, PageBytes]]) -> int:
        """How many of them are there afterwards."""
        here = self._here(self.link.writer, [page.id for page, _ in batch])
        absent = [each for each, present in zip(batch, here, strict=True) if not present]
        with self._lock:
            refused = self._refusal.off(self._clock())
        if not absent or refused:
            return sum(here)
        pipeline = self.link.writer.pipeline(transaction=False)
        stored_s, ttl_ms = time.time(), max(1, int(self._settings.ttl_s * 1e3))
        for page, content in absent:
            value = memoryview(pack_value(page.id, self.format, content, stored_s))
            pipeline.set(self._name(page.id.key), value, nx=True, px=ttl_ms)
        answers = pipeline.execute(raise_on_error=False)
        stored = sum(answer is True for answer in answers)
        with self._lock:
            self.counters.stored += stored
            self.counters.bytes_in += stored * self.format.size_bytes
            if any(isinstance(answer, Refused) for answer in answers):
                self._refusal.failed(self._clock())
            else:
                self._refusal.worked()
        taken = [page.id for (page, _), answer in zip(absent, answers, strict=True) if answer is None]
        return sum(here) + stored + sum(self._here(self.link.writer, taken))


Item = TypeVar("Item")


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
