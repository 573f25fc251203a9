"""The workers' own figures in the metrics: levels summed, counters by growth, whatever becomes of the workers."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from controller.worker_growth import WorkerGrowth
from controller.worker_record import WorkerRecord
from pdserve.v1 import membership_pb2, worker_pb2
from service_kit.metrics import Metrics


def record(name: str, incarnation: int, *tiers: worker_pb2.TierReport, late: int = 0) -> WorkerRecord:
    made = WorkerRecord(name)
    made.info = membership_pb2.WorkerInfo(worker_id=name, incarnation=incarnation)
    loads = worker_pb2.TierLoads(late=late, loaded_tokens={"disk": 16 * late})
    made.load = worker_pb2.LoadReport(tiers=tiers, loads=loads)
    return made


def tier(name: str, hits: int, used: int = 10, **failures: int) -> worker_pb2.TierReport:
    return worker_pb2.TierReport(
        tier=name, hit_tokens=hits, used_bytes=used, capacity_bytes=100, pages=2, evicted=hits, evicted_age_s=1.5 * hits,
        verify_failures=failures,
    )  # fmt: skip


def values(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    return {
        tuple(sample.labels[label] for label in sorted(sample.labels, reverse=True)): sample.value  # tier, then kind
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
        if sample.name == f"pdserve_{name}"
    }


def test_levels_are_sums_and_a_shared_tier_counts_once() -> None:
    metrics = Metrics("tiny")
    growth = WorkerGrowth(metrics)
    growth.look([record(name, 1, tier("host", 0), tier("redis", 0, used=70)) for name in ("p0", "d0")])
    assert values(metrics, "kv_tier_used_bytes") == {("host",): 20, ("redis",): 70}
    assert values(metrics, "kv_tier_capacity_bytes") == {("host",): 200, ("redis",): 100}
    assert values(metrics, "kv_tier_pages") == {("host",): 4, ("redis",): 2}


def test_levels_of_what_nobody_reports_any_more_are_zero() -> None:
    metrics = Metrics("tiny")
    growth = WorkerGrowth(metrics)
    growth.look([record("p0", 1, tier("host", 0), tier("tape", 0), tier("attic", 0))])
    assert values(metrics, "kv_tier_used_bytes") == {("host",): 10, ("other",): 20}
    growth.look([])
    assert values(metrics, "kv_tier_used_bytes") == {("host",): 0, ("other",): 0}


def test_counters_grow_by_what_is_new_over_all_workers_and_their_restarts() -> None:
    metrics = Metrics("tiny")
    growth = WorkerGrowth(metrics)
    growth.look([record("p0", 1, tier("disk", 10), late=1), record("d0", 1, tier("disk", 5))])
    growth.look([record("p0", 1, tier("disk", 14), late=3)])
    growth.look([record("p0", 2, tier("disk", 1)), record("d0", 1, tier("disk", 5))])
    assert values(metrics, "kv_tier_hit_tokens_total") == {("disk",): 10 + 5 + 4 + 1}
    assert values(metrics, "kv_tier_evicted_age_seconds_total") == {("disk",): 1.5 * 20}
    assert values(metrics, "kv_load_late_total") == {(): 3}
    assert values(metrics, "kv_tier_loaded_tokens_total") == {("disk",): 48}


def test_a_worker_that_was_lost_and_comes_back_is_not_counted_twice() -> None:
    metrics = Metrics("tiny")
    growth = WorkerGrowth(metrics)
    for records in ([record("p0", 1, tier("host", 10))], [], [record("p0", 1)], [record("p0", 1, tier("host", 12))]):
        growth.look(records)
    assert values(metrics, "kv_tier_hit_tokens_total") == {("host",): 12}


def test_labels_are_bounded_whatever_workers_report() -> None:
    metrics = Metrics("tiny")
    strange = tier("host", 0, checksum=2, sunspots=1)
    WorkerGrowth(metrics).look([record("p0", 1, strange, tier("tape", 3), tier("attic", 4))])
    assert values(metrics, "kv_tier_verify_failures_total") == {("host", "checksum"): 2, ("host", "other"): 1}
    assert values(metrics, "kv_tier_hit_tokens_total") == {("host",): 0, ("other",): 7}


def test_failed_pulls_and_loans_are_counted_by_reason() -> None:
    metrics = Metrics("tiny")
    growth = WorkerGrowth(metrics)
    failing = record("p0", 1)
    failing.load.loads.failed_pulls.update({"timeout": 2, "no such reason": 1})
    failing.load.loads.failed_loans.update({"no_capacity": 3})
    failing.load.loads.lent_tokens = 160
    growth.look([failing])
    failing.load.loads.failed_pulls["timeout"] = 3
    growth.look([failing])
    assert values(metrics, "kv_pull_failures_total") == {("timeout",): 3, ("other",): 1}
    assert values(metrics, "kv_loan_failures_total") == {("no_capacity",): 3}
    assert values(metrics, "kv_load_lent_tokens_total") == {(): 160}


def test_collisions_of_keys_on_the_device_are_counted_beside_those_below_it() -> None:
    metrics = Metrics("tiny")
    growth = WorkerGrowth(metrics)
    for collisions in (2, 5):
        reported = record("p0", 1, tier("host", 0, fingerprint=1))
        reported.load.key_collisions = collisions
        growth.look([reported])
    failed = {("device", "fingerprint"): 5, ("host", "fingerprint"): 1}
    assert values(metrics, "kv_tier_verify_failures_total") == failed


def test_looks_for_prefixes_and_failed_receptions_are_counted_once_though_their_worker_was_lost_for_a_while() -> None:
    metrics = Metrics("tiny")
    growth = WorkerGrowth(metrics)
    reported = record("p0", 1)
    reported.load.MergeFrom(
        worker_pb2.LoadReport(prefix_queries=64, prefix_hits=48, verify_failures=2, expired_leases=1)
    )
    for records in ([reported], [], [reported]):
        growth.look(records)
    names = ("prefix_cache_queries", "prefix_cache_hits", "kv_verify_failures", "kv_transfer_expired")
    assert [values(metrics, f"{name}_total") for name in names] == [{(): 64}, {(): 48}, {(): 2}, {(): 1}]
