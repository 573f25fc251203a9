"""Owns generation as the APIs see it: requests in, streams out, resumption, cancels, deadlines, and the controller's clock tick."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from random import Random

from controller.admission import AdmissionLimits, WaitingQueue, check_route
from controller.blend_gate import BlendGate
from controller.choice_output import Vocabulary
from controller.dispatch import Group
from controller.dispatch_events import DispatchEvents
from controller.dispatcher import Dispatcher
from controller.fleet import Fleet
from controller.live_request import LiveRequest, Reader
from controller.named_requests import NamedRequests
from controller.request import Begun, Delta, GenerationRequest
from controller.request_metrics import RequestObserver
from controller.timeline import Timeline, TimelineRing
from controller.waiting_room import PlacementSettings, WaitingRoom
from controller.work_orders import WorkOrders
from controller.worker_losses import WorkerLosses
from pdserve.errors import DeadlineExceeded, InvalidRequest, PdserveError, Unavailable, WorkerLost
from pdserve.v1 import worker_pb2
from service_kit.logs import get_logger

TICK_S = 0.1
FLEET_METRICS_TICKS = 10
LONGEST_LINGER_S = 30.0

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    admission: AdmissionLimits
    placement: PlacementSettings
    blends: BlendGate  # asked again for the worker that a request goes to
    request_timeout_s: float
    max_attempts: int
    timelines_kept: int
    key_prefix: int  # random 32 bits: requests of different controllers never share a key


class ControllerService:
    """Implements `controller.request.Generator`."""

    def __init__(
        self,
        fleet: Fleet,
        vocabulary: Vocabulary,
        settings: ServiceSettings,
        observer: RequestObserver,
        rng: Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._vocabulary = vocabulary
        self._settings = settings
        self._observer = observer
        self._clock = clock
        self._queue: WaitingQueue[Group] = WaitingQueue(settings.admission)
        room = WaitingRoom(fleet, self._queue, settings.placement, observer, rng)
        orders = WorkOrders(fleet, settings.blends)
        self._dispatcher = Dispatcher(fleet, room, orders, settings.placement.reserve_answer_s, observer, clock)
        self._table = self._dispatcher.table
        self._losses = WorkerLosses(fleet, self._dispatcher, clock)
        self._events = DispatchEvents(self._table, self._dispatcher, observer, clock)
        self._dispatcher.on_done = self._done
        self._named = NamedRequests()
        self._numbers = itertools.count(1)
        self._draining = False
        self._ended = asyncio.Event()  # a request has
        self._absent_since_s: float | None = clock()
        self.timelines = TimelineRing(settings.timelines_kept)
        fleet.attach(self)

    # ---- what the APIs call

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Begun | Delta]:
        reader = self._open(request)
        try:
            while True:
                for item in reader.take():
                    yield item
                if reader.ended:
                    return
                await reader.wait()  # ends by the request's deadline at the latest
        finally:
            self._close(reader)

    async def cancel(self, request_id: str) -> bool:
        live = self._named.live(request_id)
        if live is None:
            return False
        self._dispatcher.cancel(live)
        return True

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def live_requests(self) -> int:
        return len(self._table.lives())

    @property
    def draining(self) -> bool:
        return self._draining

    def _open(self, request: GenerationRequest) -> Reader:
        if request.next_index:
            live = self._named.resumable(request.request_id)
            if live is not None:
                return self._attach(live, request)
        try:
            self._check(request)
        except PdserveError as error:
            self._observer.rejected(error)
            raise
        return self._start(request)

    def _attach(self, live: LiveRequest, request: GenerationRequest) -> Reader:
        if live.request.token_ids != request.token_ids or live.request.n < len(request.next_index):
            raise InvalidRequest("Another request with this request_id lives.", param="request_id")
        log.info("request_resumed", request_id=request.request_id)
        return Reader(live, request.next_index)

    def _check(self, request: GenerationRequest) -> None:
        if self._draining:
            raise Unavailable("This controller is shutting down. Retry elsewhere, or later.", retry_after_s=1.0)
        check_route(request.route, frozenset(record.worker_id for record in self._fleet.records()))
        if not request.token_ids or request.n < 1 or request.sampling.max_tokens < 1:
            raise InvalidRequest("A request needs at least one prompt token, one choice and max_tokens of 1.")
        if len(request.next_index) > request.n:
            raise InvalidRequest("next_index has more entries than there are choices.", param="next_index")

    def _start(self, request: GenerationRequest) -> Reader:
        """A caller that resumes a request which is not known any more gets it computed again from the start: with its seed
        it draws the same tokens, and those before `next_index` are left out."""
        now = self._clock()
        timeline = Timeline.of(request, now, time.time())
        key = self._settings.key_prefix << 32 | next(self._numbers) & 0xFFFFFFFF
        live = LiveRequest(key, request, self._vocabulary, timeline, self._settings.max_attempts)
        self._table.add_live(live)
        self._named.add(live)
        self.timelines.add(timeline)
        self._observer.accepted(live)
        self._set_deadline(live)
        reader = Reader(live, request.next_index)
        self._dispatcher.admit(live)
        return reader

    def _set_deadline(self, live: LiveRequest) -> None:
        limit_s = self._settings.request_timeout_s
        asked_s = live.request.timeout_s
        timeout_s = limit_s if asked_s is None else min(limit_s, asked_s)
        error = DeadlineExceeded(f"The request did not end within {timeout_s:g} s.")
        timer = asyncio.get_running_loop().call_later(timeout_s, self._dispatcher.fail, live, error)
        live.timers.append(timer)

    def _close(self, reader: Reader) -> None:
        live = reader.live
        live.readers.remove(reader)
        if live.done or live.readers:
            return
        linger_s = min(live.request.linger_s, LONGEST_LINGER_S)
        if linger_s > 0 and not self._draining:
            live.timers.append(asyncio.get_running_loop().call_later(linger_s, self._abandon, live))
        else:
            self._dispatcher.cancel(live)

    def _abandon(self, live: LiveRequest) -> None:
        if not live.readers and not live.done:
            self._dispatcher.cancel(live)

    def _done(self, live: LiveRequest) -> None:
        self._table.drop_live(live)
        self._ended.set()
        for timer in live.timers:
            timer.cancel()
        self._named.ended(live, self._clock())

    # ---- what the fleet says (`controller.fleet.FleetSink`)

    def received(self, worker_id: str, response: worker_pb2.SessionResponse) -> None:
        self._events.received(worker_id, response)

    def reconciled(self, worker_id: str, snapshot: worker_pb2.WorkerSnapshot) -> None:
        self._note_presence()
        self._losses.reconciled(worker_id, snapshot, self._settings.key_prefix)

    def lost(self, worker_id: str, error: WorkerLost, *, died: bool) -> None:
        self._note_presence()
        self._losses.lost(worker_id, error, died=died)

    def changed(self, worker_id: str) -> None:
        self._dispatcher.pump(worker_id)

    def _note_presence(self) -> None:
        if self._fleet.serves():
            self._absent_since_s = None
        elif self._absent_since_s is None:
            self._absent_since_s = self._clock()

    # ---- time

    async def run(self) -> None:
        """Ticks until cancelled."""
        loop = asyncio.get_running_loop()
        due_s, count = loop.time() + TICK_S, 0
        while True:
            await asyncio.sleep(due_s - loop.time())
            late_s = loop.time() - due_s
            self._observer.lag(late_s)
            self.tick(max(0.0, late_s))
            count += 1
            if count % FLEET_METRICS_TICKS == 0:
                self._observer.fleet(self._fleet.records(), self.queued)
            due_s = max(due_s + TICK_S, loop.time())

    def tick(self, held_up_s: float = 0.0) -> None:
        self._fleet.tick(held_up_s)
        self._note_presence()
        now = self._clock()
        self._dispatcher.tick(now, self._absent_since_s)
        self._named.expire(now)

    async def drain(self, deadline_s: float) -> None:
        """Takes no new requests and returns when the last one has ended, or has been cancelled at the deadline."""
        self._draining = True
        try:
            async with asyncio.timeout(deadline_s):
                while self._table.lives():
                    self._ended.clear()
                    await self._ended.wait()
        except TimeoutError:
            log.warning("drain_cut_short", live_requests=self.live_requests)
            for live in self._table.lives():
                self._dispatcher.cancel(live)
