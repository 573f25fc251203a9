"""Owns the worker's answers about its tiers: operators' commands, one after the other in a thread, and the figures of LoadReport.

Figures are read in a thread too, since a look at Redis waits for it: a report tells those of a moment ago.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from engine.protocol import ClearPrefixCache
from kv_store.tier import TierFailed
from kv_store.tiered_store import TieredStore
from pdserve.errors import Overloaded, PdserveError
from pdserve.v1 import worker_pb2
from service_kit.logs import get_logger
from worker_runtime.engine_link import EngineLink
from worker_runtime.kv_commands import Bounds, OpenTier, carry_out, open_tiers
from worker_runtime.page_fills import LoadFigures
from worker_runtime.page_loans import LoanFigures
from worker_runtime.page_pulls import PullFigures
from worker_runtime.session import DEVICE_TIER
from worker_runtime.task_owner import TaskOwner

WAITING_MOST = 16
FIGURES_PERIOD_S = 0.25

Reply = Callable[[worker_pb2.CommandResult], None]

log = get_logger(__name__)


class TierDesk:
    """Knows no tier until `attach`: a worker may have none."""

    def __init__(self, engine: EngineLink, tasks: TaskOwner, clock: Callable[[], float] = time.monotonic) -> None:
        layout = engine.ready.layout
        self._engine = engine
        self._tasks = tasks
        self._clock = clock
        self._page_tokens = layout.page_tokens
        self._closed = False
        self._bounds = Bounds(layout.layers * layout.block_bytes, clock, lambda: self._closed)
        self._store: TieredStore | None = None
        self._tiers: Sequence[OpenTier] = ()
        self._loads: LoadFigures | None = None
        self._pulls = PullFigures()
        self._loans = LoanFigures()
        self._commands = ThreadPoolExecutor(1, "kv-operator")
        self._looks = ThreadPoolExecutor(1, "kv-figures")
        self._waiting = 0
        self._figures: list[worker_pb2.TierReport] = []
        self._looked_s = -FIGURES_PERIOD_S
        self._looking: asyncio.Future[list[worker_pb2.TierReport]] | None = None

    def attach(self, store: TieredStore, loads: LoadFigures, pulls: PullFigures, loans: LoanFigures) -> None:
        self._store = store
        self._pulls = pulls
        self._loans = loans
        self._tiers = open_tiers(store.tiers)
        self._loads = loads

    def handle(self, command: worker_pb2.KvCommand, reply: Reply) -> None:
        """Answers through `reply`, in this thread, when it is done."""

        def failed(error: PdserveError) -> None:
            reply(worker_pb2.CommandResult(command_id=command.command_id, reason=error.reason, message=error.message))

        if self._waiting >= WAITING_MOST:
            failed(Overloaded(f"{WAITING_MOST} KV commands wait at this worker already. Try again in a moment."))
            return
        self._waiting += 1
        self._tasks.spawn(self._handle(command, reply), failed)

    def report_into(self, report: worker_pb2.LoadReport) -> None:
        """Adds the tiers' figures, those of the last look, and begins the next one."""
        if self._store is None or self._loads is None:
            return
        report.tiers.extend(self._figures)
        loads = self._loads
        report.loads.CopyFrom(
            worker_pb2.TierLoads(
                queried_tokens=loads.queried_tokens,
                loaded_tokens=loads.loaded_tokens,
                late=loads.late,
                no_room=loads.no_room,
                not_worth_it=loads.not_worth_it,
                offers_skipped=loads.offers_skipped,
                dropped_on_the_way_down=self._store.dropped_on_the_way_down,
                load_s=loads.load_s,
                failed_pulls=self._pulls.failed,
                lent_tokens=self._loans.lent_tokens,
                failed_loans=self._loans.failed,
                pull_speeds=[
                    worker_pb2.PullSpeed(worker_id=peer, page_us=page_s * 1e6)
                    for peer, page_s in self._pulls.speeds.told(self._clock()).items()
                ],
            )
        )
        if self._looking is None and not self._closed and self._clock() - self._looked_s >= FIGURES_PERIOD_S:
            self._looking = asyncio.get_running_loop().run_in_executor(self._looks, self._look)
            self._looking.add_done_callback(self._looked)

    def close(self) -> None:
        """A command under way ends at its next page."""
        self._closed = True
        self._commands.shutdown(wait=False, cancel_futures=True)
        self._looks.shutdown(wait=False, cancel_futures=True)

    # ---- parts

    async def _handle(self, command: worker_pb2.KvCommand, reply: Reply) -> None:
        try:
            answer = await self._answer(command)
        finally:
            self._waiting -= 1
        reply(worker_pb2.CommandResult(command_id=command.command_id, kv=answer))

    async def _answer(self, command: worker_pb2.KvCommand) -> worker_pb2.KvAnswer:
        log.info("kv_command", action=worker_pb2.KvCommand.Action.Name(command.action), tiers=list(command.tiers))
        outcomes: list[worker_pb2.TierOutcome] = []
        if command.action == worker_pb2.KvCommand.ACTION_FLUSH and self._means_device(command):
            # Before the tiers: what is evicted there afterwards is not loaded from the device's copy again.
            self._engine.send(ClearPrefixCache())
            outcomes.append(worker_pb2.TierOutcome(tier=DEVICE_TIER))
        loop, arrived_s = asyncio.get_running_loop(), self._clock()
        answer = await loop.run_in_executor(self._commands, carry_out, command, self._tiers, self._bounds, arrived_s)
        for place, outcome in enumerate(outcomes):
            answer.outcomes.insert(place, outcome)
        return answer

    def _means_device(self, command: worker_pb2.KvCommand) -> bool:
        return not command.keys and (not command.tiers or DEVICE_TIER in command.tiers)

    def _look(self) -> list[worker_pb2.TierReport]:
        return [_figures(each, self._page_tokens) for each in self._tiers]

    def _looked(self, done: asyncio.Future[list[worker_pb2.TierReport]]) -> None:
        self._looking = None
        self._looked_s = self._clock()
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            self._figures = done.result()
        else:
            log.exception("tier_figures_failed", error)


def _figures(each: OpenTier, page_tokens: int) -> worker_pb2.TierReport:
    """Of a tier that does not answer, the counters alone."""
    counters = each.tier.counters
    report = worker_pb2.TierReport(
        tier=each.view.name,
        hit_tokens=counters.hits * page_tokens,
        miss_tokens=counters.misses * page_tokens,
        bytes_in=counters.bytes_in,
        bytes_out=counters.bytes_out,
        read_s=counters.read_s,
        write_s=counters.write_s,
        stored=counters.stored,
        evicted=counters.evicted,
        evicted_age_s=counters.evicted_age_s,
        expired=counters.expired,
        dropped=counters.dropped,
        failures=counters.failures,
        verify_failures={str(kind): count for kind, count in dict(counters.verify_failures).items()},
        read_pages=counters.hits,
    )
    try:
        occupancy = each.view.occupancy()
    except TierFailed:
        return report
    report.capacity_bytes, report.used_bytes = occupancy.capacity_bytes, occupancy.used_bytes
    if occupancy.pages is not None:
        report.pages = occupancy.pages
    return report
