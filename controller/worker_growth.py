"""Owns what reaches the metrics of the workers' own figures: levels as they are, counters by their growth. Not thread-safe."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from controller.kv_holdings import DEVICE_TIER
from controller.worker_record import WorkerRecord
from pdserve.v1 import worker_pb2
from service_kit.metrics import LoadCount, Metrics, TierCount, TierLevel, tier_label

_SHARED_TIER = "redis"  # every worker reports the same one
_LEVELS: tuple[TierLevel, ...] = ("used_bytes", "capacity_bytes", "pages")
_COUNTS: dict[TierCount, Callable[[worker_pb2.TierReport], float]] = {
    "hit_tokens": lambda report: report.hit_tokens,
    "miss_tokens": lambda report: report.miss_tokens,
    "bytes_in": lambda report: report.bytes_in,
    "bytes_out": lambda report: report.bytes_out,
    "read_seconds": lambda report: report.read_s,
    "read_pages": lambda report: report.read_pages,
    "write_seconds": lambda report: report.write_s,
    "stored_pages": lambda report: report.stored,
    "evicted_pages": lambda report: report.evicted,
    "evicted_age_seconds": lambda report: report.evicted_age_s,
    "expired_pages": lambda report: report.expired,
    "dropped_pages": lambda report: report.dropped,
    "failures": lambda report: report.failures,
}
_LOADS: dict[LoadCount, Callable[[worker_pb2.TierLoads], float]] = {
    "queried_tokens": lambda loads: loads.queried_tokens,
    "seconds": lambda loads: loads.load_s,
    "late": lambda loads: loads.late,
    "no_room": lambda loads: loads.no_room,
    "not_worth_it": lambda loads: loads.not_worth_it,
    "offers_skipped": lambda loads: loads.offers_skipped,
    "dropped_on_the_way_down": lambda loads: loads.dropped_on_the_way_down,
    "lent_tokens": lambda loads: loads.lent_tokens,
}

_INCARNATIONS_KEPT = 8192  # a worker that was lost may come back, and has not begun anew

_Name = tuple[str, ...]


class WorkerGrowth:
    """Counters of a worker begin anew with each of its incarnations; what was counted of the last one stays."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._tiers = metrics.tiers
        self._levels: dict[tuple[TierLevel, str], float] = {}
        self._seen: OrderedDict[tuple[str, int], dict[_Name, float]] = OrderedDict()

    def look(self, records: Iterable[WorkerRecord]) -> None:
        """At the last report of every worker that is there."""
        levels = dict.fromkeys(self._levels, 0.0)  # what nobody reports any more is empty
        for record in records:
            who = (record.worker_id, record.info.incarnation)
            seen = self._seen.setdefault(who, {})
            self._seen.move_to_end(who)
            for report in record.load.tiers:
                self._add_levels(levels, report)
                self._count_tier(seen, report)
            self._count_loads(seen, record.load.loads)
            self._count_device(seen, record.load)
        self._levels = levels
        for (name, tier), value in levels.items():
            self._tiers.level(name, tier, value)
        while len(self._seen) > _INCARNATIONS_KEPT:
            self._seen.popitem(last=False)

    def _add_levels(self, levels: dict[tuple[TierLevel, str], float], report: worker_pb2.TierReport) -> None:
        values = {"used_bytes": report.used_bytes, "capacity_bytes": report.capacity_bytes, "pages": report.pages}
        for name in _LEVELS:
            if name == "pages" and not report.HasField("pages"):
                continue
            place = (name, tier_label(report.tier))
            so_far, shared = levels.get(place, 0.0), report.tier == _SHARED_TIER
            levels[place] = max(so_far, values[name]) if shared else so_far + values[name]

    def _count_tier(self, seen: dict[_Name, float], report: worker_pb2.TierReport) -> None:
        for name, value_of in _COUNTS.items():
            self._tiers.grown(name, report.tier, _growth(seen, (name, report.tier), value_of(report)))
        for kind, count in report.verify_failures.items():
            self._tiers.verify_failed(report.tier, kind, _growth(seen, ("verify", report.tier, kind), count))

    def _count_device(self, seen: dict[_Name, float], load: worker_pb2.LoadReport) -> None:
        queries = _growth(seen, ("prefix_queries",), load.prefix_queries)
        self._metrics.fleet.prefix_lookups(queries, _growth(seen, ("prefix_hits",), load.prefix_hits))
        self._metrics.transfer.verify_failed(_growth(seen, ("segments",), load.verify_failures))
        self._metrics.transfer.expired(_growth(seen, ("leases",), load.expired_leases))
        if load.key_collisions:
            collided = _growth(seen, ("verify", DEVICE_TIER), load.key_collisions)
            self._tiers.verify_failed(DEVICE_TIER, "fingerprint", collided)

    def _count_loads(self, seen: dict[_Name, float], loads: worker_pb2.TierLoads) -> None:
        for name, value_of in _LOADS.items():
            self._tiers.loads_grown(name, _growth(seen, ("load", name), value_of(loads)))
        for tier, tokens in loads.loaded_tokens.items():
            self._tiers.grown("loaded_tokens", tier, _growth(seen, ("loaded", tier), tokens))
        for reason, count in loads.failed_pulls.items():
            self._tiers.peer_failed("pull", reason, _growth(seen, ("pull", reason), count))
        for reason, count in loads.failed_loans.items():
            self._tiers.peer_failed("loan", reason, _growth(seen, ("loan", reason), count))


def _growth(seen: dict[_Name, float], name: _Name, value: float) -> float:
    """Beyond the highest value seen: a worker that was lost says nothing for a while, and then all of it again."""
    before = seen.get(name, 0.0)
    seen[name] = max(before, value)
    return seen[name] - before
