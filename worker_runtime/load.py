"""Owns the worker's LoadReport: the engine's last Load, what this process knows, and whom a hung engine would deceive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.protocol import Load
from pdserve.v1 import worker_pb2
from worker_runtime.holding import Holding


@dataclass(frozen=True, slots=True)
class ReceiverFigures:
    """Counters of the KV receiver since the start."""

    verify_failures: int = 0
    expired_leases: int = 0


class LoadBoard:
    def __init__(self, holding: Holding, blocks_total: int) -> None:
        self._holding = holding
        self._last = Load(0, blocks_total, blocks_total, 0, 0, 0, 0, 0, 0.0, 0, 0, 0, 0)
        self._receiver: Callable[[], ReceiverFigures] = ReceiverFigures
        self._add_tiers: Callable[[worker_pb2.LoadReport], None] = lambda report: None

    @property
    def last(self) -> Load:
        return self._last

    def engine_load(self, load: Load) -> None:
        self._last = load

    def count_with(self, receiver: Callable[[], ReceiverFigures]) -> None:
        self._receiver = receiver

    def add_tiers_with(self, add_tiers: Callable[[worker_pb2.LoadReport], None]) -> None:
        self._add_tiers = add_tiers

    def report(self) -> worker_pb2.LoadReport:
        load, receiver = self._last, self._receiver()
        report = worker_pb2.LoadReport(
            engine_step=load.step,
            blocks_total=load.blocks_total,
            blocks_free=load.blocks_free,
            blocks_leaked=load.blocks_leaked,
            running=load.running,
            waiting=load.waiting,
            waiting_tokens=load.waiting_tokens,
            roles=self._holding.to_proto(),
            step_ms=load.step_ms,
            prefix_queries=load.prefix_queries,
            prefix_hits=load.prefix_hits,
            preemptions=load.preemptions,
            reserved_blocks=load.reserved_blocks,
            draining=self._holding.draining,
            verify_failures=receiver.verify_failures,
            expired_leases=receiver.expired_leases,
            resident_bytes=load.resident_bytes,
            key_collisions=load.key_collisions,
            prefill_token_us=load.prefill_token_us,
            pinned_bytes=load.pinned_bytes,
        )
        self._add_tiers(report)
        return report
