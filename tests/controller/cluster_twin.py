"""Owns a controller with scripted workers, in one event loop, joined by real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

from controller.admission import AdmissionLimits
from controller.blend_gate import BlendGate
from controller.fleet import Fleet, FleetSettings
from controller.operator_desk import Identity, OperatorDesk
from controller.placement.policies import policy_named
from controller.request import Begun, Delta, GenerationRequest, Logprobs, SamplingSpec
from controller.request_metrics import RequestObserver
from controller.service import ControllerService, ServiceSettings
from controller.waiting_room import PlacementSettings
from pdserve.v1 import types_pb2
from service_kit.config import TransferConfig
from service_kit.metrics import Metrics
from tests.controller.blend_twins import open_gate
from tests.controller.worker_twin import DECODE, PREFILL, WorkerTwin

DEADLINE_S = 60.0
PROMPT = b"".join(token.to_bytes(4, "little") for token in range(100, 150))


class ByteVocabulary:
    """Token ids are bytes; 0 ends."""

    text_pieces = tuple(bytes([byte]) for byte in range(256))
    eos_token_ids = (0,)


@dataclass
class Got:
    """A folded stream."""

    token_ids: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[Logprobs]] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    stop_reason: dict[int, str | int | None] = field(default_factory=dict)
    begun: Begun | None = None

    def add(self, item: Begun | Delta) -> None:
        if isinstance(item, Begun):
            assert self.begun is None, "Begun comes once, first"
            self.begun = item
            return
        assert self.begun is not None, "Begun comes first"
        assert item.choice not in self.finish, "nothing follows the end of a choice"
        ids = self.token_ids.setdefault(item.choice, [])
        if ids:
            assert item.index == len(ids) + self.first.get(item.choice, 0), "indices have neither gap nor repetition"
        else:
            self.first[item.choice] = item.index
        ids.extend(item.token_ids)
        self.text[item.choice] = self.text.get(item.choice, "") + item.text
        self.logprobs.setdefault(item.choice, []).extend(item.logprobs)
        if item.finish_reason is not None:
            self.finish[item.choice] = item.finish_reason
            self.stop_reason[item.choice] = item.stop_reason

    first: dict[int, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(len(ids) for ids in self.token_ids.values())


@dataclass
class ClusterTwin:
    service: ControllerService
    fleet: Fleet
    desk: OperatorDesk
    metrics: Metrics
    by_address: dict[str, WorkerTwin] = field(default_factory=dict)
    workers: dict[str, WorkerTwin] = field(default_factory=dict)

    async def add(self, worker: WorkerTwin) -> WorkerTwin:
        await worker.start()
        self.workers[worker.worker_id] = worker
        self.fleet.register(worker.info())
        await self.until(lambda: self.state(worker.worker_id) == "READY", f"{worker.worker_id} ready")
        return worker

    def twin(self, worker_id: str, *roles: types_pb2.Role.ValueType, **options: float) -> WorkerTwin:
        return WorkerTwin(self.by_address, worker_id, roles, **options)  # type: ignore[arg-type]

    async def square(self) -> None:
        """2 prefill + 2 decode workers."""
        for name, role in (("p0", PREFILL), ("p1", PREFILL), ("d0", DECODE), ("d1", DECODE)):
            await self.add(self.twin(name, role))

    def state(self, worker_id: str) -> str:
        record = self.fleet.record(worker_id)
        return record.member.state if record is not None else ""

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not condition():  # noqa: ASYNC110 (conditions have no event)
                    await asyncio.sleep(0.002)
        except TimeoutError:
            raise AssertionError(f"not within {DEADLINE_S} s: {what}") from None

    async def collect(self, request: GenerationRequest) -> Got:
        got = Got()
        async with asyncio.timeout(DEADLINE_S):
            async for item in self.service.generate(request):
                got.add(item)
        return got

    def idle(self) -> bool:
        """Nothing of any request is left, here or in a worker."""
        records = self.fleet.records()
        here = not self.service.live_requests and not self.service.queued
        clean = all(record.dispatches == 0 and record.view().sequences == record.load.running for record in records)
        there = all(not worker.runs and not worker.reserved for worker in self.workers.values() if worker.alive)
        return here and clean and there


@asynccontextmanager
async def cluster(
    *,
    queue_limit: int = 100,
    grace_s: float = 0.5,
    queue_timeout_s: float = 10.0,
    request_timeout_s: float = 30.0,
    patience: float = 5.0,
    blends: BlendGate | None = None,
) -> AsyncIterator[ClusterTwin]:
    """`patience` stretches the deadlines for silent workers: real engines on a busy machine need more than twins."""
    clock = asyncio.get_running_loop().time
    metrics = Metrics("twin")
    fleet = Fleet(FleetSettings("controller-under-test", 0.2 * patience, 3, stall_s=0.4 * patience), clock)
    settings = ServiceSettings(
        AdmissionLimits(queue_limit, queue_timeout_s, grace_s),
        PlacementSettings("least-loaded", policy_named("least-loaded"), "", reserve_answer_s=0.3 * patience),
        blends or open_gate(),
        request_timeout_s=request_timeout_s,
        max_attempts=5,
        timelines_kept=100,
        key_prefix=7,
    )
    service = ControllerService(fleet, ByteVocabulary(), settings, RequestObserver(metrics), Random(1), clock)
    desk = OperatorDesk(fleet, service, Identity("controller-under-test", "twin", "0"), open_gate(), 5.0, clock)
    twin = ClusterTwin(service, fleet, desk, metrics)
    ticking = asyncio.create_task(service.run())
    try:
        yield twin
    finally:
        ticking.cancel()
        await fleet.close()
        for worker in twin.workers.values():
            await worker.kill()


# For real workers in a test's own process: on a busy machine a peer that gets no turn for seconds is neither silent nor gone.
PATIENT_TRANSFER = TransferConfig(heartbeat_misses=40, connect_s=30.0, lease_s=60.0)
_NUMBERS = iter(range(10**9))


def asked(
    max_tokens: int = 20,
    *,
    n: int = 1,
    seed: int = 3,
    stop: tuple[str, ...] = (),
    logprobs: int | None = None,
    prompt: bytes = PROMPT,
) -> GenerationRequest:
    sampling = SamplingSpec(max_tokens=max_tokens, seed=seed, logprobs=logprobs)
    return GenerationRequest(f"r{next(_NUMBERS)}", prompt, sampling, n=n, stop=stop)
