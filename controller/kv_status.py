"""Owns a worker's tier figures as operators see them, from its last load report. Pure."""

from __future__ import annotations

from controller.kv_operations import LoadsStatus, TierStatus, WorkerTiers
from controller.worker_record import WorkerRecord
from kv_transfer.keys import HASH_UNIT_TOKENS
from pdserve.v1 import worker_pb2


def worker_tiers(record: WorkerRecord) -> WorkerTiers:
    load, block_tokens = record.load, record.view().block_tokens
    return WorkerTiers(
        worker=record.worker_id,
        block_tokens=block_tokens,
        device_tokens=load.blocks_total * block_tokens,
        device_free_tokens=load.blocks_free * block_tokens,
        device_query_tokens=load.prefix_queries,
        device_hit_tokens=load.prefix_hits,
        held_tokens={tier: units * HASH_UNIT_TOKENS for tier, units in record.holdings.units().items()},
        tiers=tuple([tier_status(report) for report in load.tiers]),
        loads=loads_status(load.loads),
    )


def tier_status(report: worker_pb2.TierReport) -> TierStatus:
    return TierStatus(
        tier=report.tier,
        capacity_bytes=report.capacity_bytes,
        used_bytes=report.used_bytes,
        pages=report.pages if report.HasField("pages") else None,
        hit_tokens=report.hit_tokens,
        miss_tokens=report.miss_tokens,
        bytes_in=report.bytes_in,
        bytes_out=report.bytes_out,
        read_s=report.read_s,
        read_pages=report.read_pages,
        write_s=report.write_s,
        stored=report.stored,
        evicted=report.evicted,
        evicted_age_s=report.evicted_age_s,
        expired=report.expired,
        dropped=report.dropped,
        failures=report.failures,
        verify_failures=dict(report.verify_failures),
    )


def loads_status(loads: worker_pb2.TierLoads) -> LoadsStatus:
    return LoadsStatus(
        queried_tokens=loads.queried_tokens,
        loaded_tokens=dict(loads.loaded_tokens),
        late=loads.late,
        no_room=loads.no_room,
        not_worth_it=loads.not_worth_it,
        offers_skipped=loads.offers_skipped,
        dropped_on_the_way_down=loads.dropped_on_the_way_down,
        load_s=loads.load_s,
    )
