"""Owns what an operator's command does to the tiers. Blocking: it belongs in a thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kv_store.disk.disk_tier import DiskTier
from kv_store.host_tier import HostTier
from kv_store.inspection import InspectedTier
from kv_store.redis_inspection import RedisInspection
from kv_store.redis_tier import RedisTier
from kv_store.tier import PageTier, TierFailed
from kv_transfer.keys import HASH_BYTES
from pdserve.errors import InvalidRequest
from pdserve.v1 import worker_pb2

LISTED = 100
LISTED_MOST = 10_000
KEYS_MOST = 10_000
DEADLINE_S = 5.0
DEADLINE_MOST_S = 8.0  # the controller waits 10 s for an answer
VERIFIED_BYTES = 2**30
BAD_KEYS_TOLD = 100
_KEYS_PER_REMOVAL = 1000

Command = worker_pb2.KvCommand


@dataclass(frozen=True, slots=True)
class OpenTier:
    """A tier, and how operators look at it."""

    tier: PageTier
    view: InspectedTier


@dataclass(frozen=True, slots=True)
class Bounds:
    """page_bytes: of one page's payload. stopped: the worker ends."""

    page_bytes: int
    clock: Callable[[], float]
    stopped: Callable[[], bool] = lambda: False


def open_tiers(tiers: Sequence[PageTier]) -> list[OpenTier]:
    """Those that can be looked at, nearest first."""
    found: list[OpenTier] = []
    for tier in tiers:
        if isinstance(tier, HostTier | DiskTier):
            found.append(OpenTier(tier, tier))
        elif isinstance(tier, RedisTier):
            found.append(OpenTier(tier, RedisInspection(tier)))
    return found


def carry_out(command: Command, tiers: Sequence[OpenTier], bounds: Bounds, arrived_s: float) -> worker_pb2.KvAnswer:
    """Its deadline counts from when it arrived: whoever asked waits since then. What a tier's medium refuses
    is told in its outcome. Raises InvalidRequest."""
    keys = _keys(command)
    chosen = [each for each in tiers if not command.tiers or each.view.name in command.tiers]
    answer = worker_pb2.KvAnswer()
    ends_s = arrived_s + min((command.deadline_ms / 1000) or DEADLINE_S, DEADLINE_MOST_S)
    work = _Work(command, keys, lambda: bounds.stopped() or bounds.clock() >= ends_s, bounds.page_bytes)
    for each in chosen:
        outcome = worker_pb2.TierOutcome(tier=each.view.name)
        try:
            match command.action:
                case Command.ACTION_LIST:
                    answer.pages.extend(_list(each.view, work))
                    continue
                case Command.ACTION_PIN:
                    outcome.pages = sum(each.view.hold(key, command.hold_ms / 1000) for key in keys)
                case Command.ACTION_FLUSH:
                    _flush(each, work, outcome)
                case Command.ACTION_VERIFY:
                    _verify(each.view, work, outcome)
                case _:
                    raise InvalidRequest(f"KV action {command.action} is unknown here.", param="action")
        except TierFailed as error:
            outcome.failure = error.message
        answer.outcomes.append(outcome)
    return answer


@dataclass(frozen=True, slots=True)
class _Work:
    command: Command
    keys: Sequence[bytes]
    over: Callable[[], bool]
    page_bytes: int


def _keys(command: Command) -> list[bytes]:
    packed = command.keys
    if len(packed) % HASH_BYTES or len(packed) > KEYS_MOST * HASH_BYTES:
        raise InvalidRequest(f"keys must be at most {KEYS_MOST} of {HASH_BYTES} bytes each.", param="keys")
    if not packed and command.action == Command.ACTION_PIN:
        raise InvalidRequest("Name the pages to pin.", param="keys")
    return [packed[at : at + HASH_BYTES] for at in range(0, len(packed), HASH_BYTES)]


def _list(view: InspectedTier, work: _Work) -> list[worker_pb2.KvPage]:
    limit = min(work.command.limit or LISTED, LISTED_MOST)
    return [
        worker_pb2.KvPage(
            key=row.id.key,
            parent=row.parent,
            tier=view.name,
            bytes=row.size_bytes,
            age_s=row.age_s,
            refs=row.refs,
            held_s=row.held_s,
        )
        for row in view.rows(work.keys, limit)
    ]


def _flush(each: OpenTier, work: _Work, outcome: worker_pb2.TierOutcome) -> None:
    """At least one batch, whatever the deadline."""
    keys = work.keys or each.view.keys()
    for start in range(0, len(keys), _KEYS_PER_REMOVAL):
        outcome.pages += each.tier.remove(keys[start : start + _KEYS_PER_REMOVAL])
        if work.over() and start + _KEYS_PER_REMOVAL < len(keys):
            outcome.cut = True
            return


def _verify(view: InspectedTier, work: _Work, outcome: worker_pb2.TierOutcome) -> None:
    """In the order of keys, so that what was cut can be gone on with. At least one page, whatever the bounds."""
    most_bytes = work.command.max_bytes or VERIFIED_BYTES
    keys = sorted(key for key in work.keys or view.keys() if key > work.command.after)
    for at, key in enumerate(keys):
        if at and (outcome.bytes >= most_bytes or work.over()):
            outcome.cut = True
            outcome.last_key = keys[at - 1]
            return
        finding = view.check(key)
        outcome.pages += finding == "good"
        outcome.bad += finding == "bad"
        outcome.bytes += work.page_bytes if finding != "absent" else 0
        if finding == "bad" and len(outcome.bad_keys) < BAD_KEYS_TOLD * HASH_BYTES:
            outcome.bad_keys += key
