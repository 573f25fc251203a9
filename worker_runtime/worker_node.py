"""Owns one worker: composes sessions, registration, KV endpoint and roles over an engine link. No globals, no signals."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence

from kv_transfer.transport import Transport
from pdserve.errors import WorkerLost
from pdserve.v1 import worker_pb2
from service_kit.grpc_server import channel_credentials, open_channel, worker_credentials
from service_kit.logs import get_logger
from worker_runtime.commands import CommandRouter, NodeControl
from worker_runtime.dispatches import DispatchRecord, DispatchTable
from worker_runtime.drain import Drain
from worker_runtime.engine_link import EngineLink
from worker_runtime.event_router import EventRouter
from worker_runtime.grpc_endpoint import GrpcEndpoint, check_worker_exposure
from worker_runtime.holding import Holding, RoleName
from worker_runtime.introduction import Introduction
from worker_runtime.kv_endpoint import KvEndpoint, kv_side, open_transports
from worker_runtime.kv_index import KvIndex
from worker_runtime.load import LoadBoard
from worker_runtime.node_settings import NodeSettings
from worker_runtime.page_loans import PageLoans
from worker_runtime.page_pulls import PagePulls
from worker_runtime.page_tiers import OpenStore, PageTiers, TierNews, page_format
from worker_runtime.registration import Registration
from worker_runtime.reports import DispatchReports
from worker_runtime.roles import RoleContext, RoleFactory, combined_policy
from worker_runtime.session import SessionHub
from worker_runtime.session_service import SessionService
from worker_runtime.snapshots import held_dispatches
from worker_runtime.task_owner import TaskOwner
from worker_runtime.tier_desk import TierDesk
from worker_runtime.tier_reads import TierReads, arena_pages
from worker_runtime.work_entrance import DirectEntrance, WorkEntrance

SWEEP_S = 0.1
CLOSE_GRACE_S = 0.5

log = get_logger(__name__)


class WorkerNode:
    """`open`, then `run` until the worker is drained or its engine is gone, then `close`."""

    def __init__(
        self,
        settings: NodeSettings,
        link: EngineLink,
        transports: dict[str, Transport],
        open_store: OpenStore | None,
    ) -> None:
        config, clock = settings.config, time.monotonic
        self._settings = settings
        self._link = link
        self._clock = clock
        self._holding = Holding(settings.roles)
        self._load = LoadBoard(self._holding, link.ready.layout.blocks)
        self._dispatches = DispatchTable(tombstone_s=2 * config.transfer.lease_s)
        on_device = KvIndex()
        self._hub = SessionHub(
            config.worker.orphan_s, config.worker.orphan_buffer_bytes, on_device, self._load.report, clock
        )
        self._tasks = TaskOwner()
        side = kv_side(link.ready, settings.worker_id, settings.incarnation, link)
        to_workers = worker_credentials(config.security)
        self._kv = KvEndpoint(
            side, transports, config.transfer, link, lambda address: open_channel(address, to_workers)
        )
        self._tiers: PageTiers | None = None
        self._loans: PageLoans | None = None
        self._tier_desk = TierDesk(link, self._tasks)
        if open_store is not None:
            self._open_tiers(open_store, on_device)
        self._entrance: WorkEntrance = self._tiers or DirectEntrance(link)
        self._load.count_with(self._kv.figures)
        self._load.add_tiers_with(self._tier_desk.report_into)
        self._reports = DispatchReports(self._dispatches, self._hub, self._load.report)
        self._events = EventRouter(self._dispatches, self._reports, self._load, self._hub, self._entrance)
        self._grpc = GrpcEndpoint(config)
        self._introduction = Introduction(settings, link.ready, self._kv, self._holding, lambda: self._grpc.address)
        self._gone = asyncio.Event()
        self._drain = Drain()

    @classmethod
    async def open(
        cls,
        settings: NodeSettings,
        link: EngineLink,
        roles: Sequence[RoleFactory],
        *,
        transports: dict[str, Transport] | None = None,
        open_store: OpenStore | None = None,
    ) -> WorkerNode:
        """Binds every endpoint, sets the engine's policy and serves gRPC. Controllers learn of it once `run` runs.
        Raises ConfigInvalid where an address, a TLS file or the exposure is wrong.

        transports: instead of those that the configuration names; in tests and fleets. open_store: the tiers below the device;
        None = there are none.
        """
        config = settings.config
        check_worker_exposure(config)
        opened = transports if transports is not None else open_transports(config.transfer, config.worker.host)
        node = cls(settings, link, opened, open_store)
        await node._kv.start()
        await node._serve(roles)
        log.info("worker_ready", worker_id=settings.worker_id, address=node.address, roles=sorted(settings.roles))
        return node

    @property
    def address(self) -> str:
        return self._grpc.address

    async def run(self) -> None:
        """Returns once the worker is drained. Raises WorkerLost when the engine is gone."""
        config = self._settings.config
        to_controllers = channel_credentials(config.security)
        channels = [open_channel(address, to_controllers) for address in config.controllers]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._consume()), group.create_task(self._beat())]
                tasks.append(group.create_task(self._sweep()))
                for address, channel in zip(config.controllers, channels, strict=True):
                    registration = Registration(
                        address, channel, self._introduction.to_proto, self._hub, random.Random()
                    )
                    tasks.append(group.create_task(registration.run()))
                await self._gone.wait()
                for task in tasks:
                    task.cancel()
        except* WorkerLost as lost:
            raise lost.exceptions[0] from None
        finally:
            for channel in channels:
                await channel.close(None)

    def drain(self, deadline_s: float, drained: Callable[[], None] | None = None) -> None:
        """No new work from now on; running work may finish until the deadline, then `run` returns. Idempotent: the
        earliest deadline holds."""
        if self._drain.order(self._clock() + deadline_s, drained):
            log.info("worker_draining", deadline_s=deadline_s, dispatches=len(list(self._dispatches.live())))
            self._holding.drain()
            self._hub.heartbeat()

    async def close(self) -> None:
        """Ends every task, endpoint and the engine; idempotent."""
        await self._grpc.close(CLOSE_GRACE_S)
        self._tier_desk.close()
        await self._tasks.close()
        if self._loans is not None:
            await self._loans.close()
        await self._kv.close()
        await self._link.close()
        if self._tiers is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._tiers.close)

    def _open_tiers(self, open_store: OpenStore, on_device: KvIndex) -> None:
        link, holds = self._link, on_device.__contains__
        store = open_store(page_format(link.ready), TierNews(self._hub, asyncio.get_running_loop()))
        pulls = PagePulls(self._kv, lambda: self._grpc.address)
        tiers = self._tiers = PageTiers(store, link, self._settings.config.store, self._tasks, holds, pulls)
        reads = TierReads(store, arena_pages(link), 1, "kv-lend")
        self._loans = PageLoans(self._kv, tiers.openings, reads, tiers.cutter, holds)
        self._tier_desk.attach(store, tiers.figures, pulls.figures, self._loans.figures)

    async def _serve(self, roles: Sequence[RoleFactory]) -> None:
        context = RoleContext(
            config=self._settings.config,
            engine=self._link,
            entrance=self._entrance,
            kv=self._kv,
            dispatches=self._dispatches,
            reports=self._reports,
            holding=self._holding,
            load=self._load,
            tasks=self._tasks,
        )
        self._roles = [factory(context) for factory in roles]
        handlers = {name: handler for role in self._roles for name, handler in role.commands().items()}
        self._commands = CommandRouter(
            context, self._hub, handlers, NodeControl(self._set_roles, self.drain, self._tier_desk.handle), self._clock
        )
        self._set_roles(self._holding.roles)
        sessions = SessionService(self._hub, self._commands, self._snapshot)
        await self._grpc.start(sessions, self._kv.receiver, self._loans)

    def _set_roles(self, roles: frozenset[RoleName]) -> None:
        self._holding.set_roles(roles)
        self._link.send(combined_policy(role.policy() for role in self._roles if role.role in roles))
        self._hub.heartbeat()

    async def _consume(self) -> None:
        try:
            async for event in self._link.events():
                self._events.route(event)
        finally:
            self._holding.lose_engine()  # sessions stay open a little longer, and controllers still send work
            self._hub.heartbeat()

    async def _beat(self) -> None:
        while True:
            self._hub.heartbeat()
            await asyncio.sleep(self._settings.config.worker.heartbeat_s)

    async def _sweep(self) -> None:
        """What ends by time alone: orphans, tombstones, a drain."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self._clock()
            for controller_id in self._hub.expired():
                log.warning("session_expired", controller_id=controller_id)
                self._commands.cancel_all_of(controller_id)
            self._dispatches.expire(now)
            live = list(self._dispatches.live())
            if self._drain.due(now, len(live)):
                await self._take_leave(now, live)

    async def _take_leave(self, now: float, live: Sequence[DispatchRecord]) -> None:
        for record in live:
            self._reports.failed(record.work.dispatch, WorkerLost("This worker was drained before the request ended."))
            record.handler.cancel()
        if self._drain.begin_last_words(now):
            await self._grpc.serving(False)
        if self._drain.over(now, acknowledged=self._hub.all_acknowledged()):
            log.info("worker_drained", worker_id=self._settings.worker_id)
            self._gone.set()

    def _snapshot(self, controller_id: str) -> worker_pb2.WorkerSnapshot:
        held = [
            record
            for record in self._dispatches.records()
            if record.owner == controller_id or not self._hub.is_open(record.owner)
        ]
        return worker_pb2.WorkerSnapshot(
            worker=self._introduction.to_proto(),
            load=self._load.report(),
            held=held_dispatches(held),
            draining=self._holding.draining,
        )
