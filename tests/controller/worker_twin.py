"""Owns a scripted worker: a real gRPC server that speaks WorkerService over a scripted engine, and can be killed.

Twins of one fleet hand over among themselves by address.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import grpc

from pdserve.v1 import membership_pb2, types_pb2, worker_pb2, worker_pb2_grpc
from tests.controller.twin_engine import TwinEngine
from tests.controller.twin_faults import Faults
from tests.controller.twin_session import TwinSession

PREFILL, DECODE = types_pb2.ROLE_PREFILL, types_pb2.ROLE_DECODE
_INCARNATIONS = iter(range(1, 10**9))


class WorkerTwin(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(
        self,
        fleet: dict[str, WorkerTwin],
        worker_id: str,
        roles: tuple[types_pb2.Role.ValueType, ...],
        *,
        step_s: float = 0.001,
        blocks: int = 1000,
        max_batch: int = 64,
        max_context: int = 4096,
        identity: bytes = b"i" * 32,
        transports: tuple[str, ...] = ("tcp",),
        slots: int = 1000,
    ) -> None:
        self.worker_id = worker_id
        self.roles = roles
        self.faults = Faults()
        self.incarnation = next(_INCARNATIONS)
        self.address = ""
        self.commands: list[worker_pb2.SessionRequest] = []
        self.acknowledged = 0
        self.draining = False
        self.tiers: list[worker_pb2.TierReport] = []
        self.prefill_token_us = 0.0
        self.layers = 12
        self.kv_answer: Callable[[worker_pb2.KvCommand], worker_pb2.CommandResult | None] = lambda command: None
        self.engine = TwinEngine(self, self._engine_at, step_s=step_s, slots=slots)
        self.runs, self.reserved, self.cancelled = self.engine.runs, self.engine.reserved, self.engine.cancelled
        self._fleet = fleet
        self._step_s = step_s
        self._blocks = blocks
        self._max_batch = max_batch
        self._max_context = max_context
        self._identity = identity
        self._transports = transports
        self.session: TwinSession | None = None
        self._server: grpc.aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # ---- life

    async def start(self) -> None:
        self._server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self.address = f"127.0.0.1:{port}"
        self._fleet[self.address] = self
        self._tasks = [asyncio.create_task(self._heartbeats()), asyncio.create_task(self.engine.decode_loop())]

    async def kill(self) -> None:
        """As SIGKILL looks to the others: the port refuses, streams are reset, nothing is said."""
        self._fleet.pop(self.address, None)
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            if task is not asyncio.current_task():
                task.cancel()
        server, self._server = self._server, None
        self.engine.stop()
        if server is not None:
            await server.stop(None)
        self.engine.stop()  # commands may have come until now

    def die(self) -> None:
        """`kill`, from within."""
        self._dying = asyncio.create_task(self.kill())

    @property
    def alive(self) -> bool:
        return self._server is not None

    def _engine_at(self, address: str) -> TwinEngine | None:
        peer = self._fleet.get(address)
        return peer.engine if peer is not None else None

    # ---- what it says of itself

    @property
    def steps(self) -> int:
        return self.engine.steps

    def info(self) -> membership_pb2.WorkerInfo:
        return membership_pb2.WorkerInfo(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            address=self.address,
            roles=self.roles,
            identity=types_pb2.KvIdentity(digest=self._identity, model="twin"),
            layout=[types_pb2.LayoutGroup(layer_count=self.layers)],
            kv_endpoints=[types_pb2.KvEndpoint(transport=name, address="127.0.0.1:1") for name in self._transports],
            capabilities=membership_pb2.Capabilities(
                max_context_tokens=self._max_context, max_batch=self._max_batch, token_budget=2048,
                blocks_total=self._blocks, block_tokens=16,
            ),
            pid=1,
            engine_pid=2,
        )  # fmt: skip

    def load(self) -> worker_pb2.LoadReport:
        used = sum(len(run.work.token_ids) // 64 + 1 for run in self.runs.values())
        return worker_pb2.LoadReport(
            engine_step=self.steps, blocks_total=self._blocks, blocks_free=max(0, self._blocks - used),
            running=sum(len(run.next_index) for run in self.runs.values()), roles=self.roles, draining=self.draining,
            step_ms=self._step_s * 1000, tiers=self.tiers, prefill_token_us=self.prefill_token_us,
        )  # fmt: skip

    def _snapshot(self) -> worker_pb2.WorkerSnapshot:
        held = [worker_pb2.HeldDispatch(dispatch=run.work.dispatch) for run in self.runs.values()]
        held += [worker_pb2.HeldDispatch(dispatch=work.dispatch) for work in self.reserved.values()]
        return worker_pb2.WorkerSnapshot(worker=self.info(), load=self.load(), held=held, draining=self.draining)

    # ---- the session

    async def Session(  # noqa: N802
        self,
        request_iterator: AsyncIterator[worker_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[worker_pb2.SessionRequest, worker_pb2.SessionResponse],
    ) -> AsyncIterator[worker_pb2.SessionResponse]:
        opening = (await anext(aiter(request_iterator))).open
        session = self.session
        if session is None or session.controller_id != opening.controller_id:
            session = self.session = TwinSession(opening.controller_id)
        reader = asyncio.create_task(self._read(request_iterator, session))
        try:
            async for response in session.open(worker_pb2.SessionResponse(snapshot=self._snapshot())):
                yield response
        finally:
            reader.cancel()

    async def _read(self, requests: AsyncIterator[worker_pb2.SessionRequest], session: TwinSession) -> None:
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.UsageError):
            async for request in requests:
                if request.WhichOneof("command") == "ack":
                    self.acknowledged = max(self.acknowledged, request.ack.sequence)
                    session.acknowledge(request.ack.sequence)
                else:
                    self.commands.append(request)
                    self._handle(request)

    def tell(self, response: worker_pb2.SessionResponse) -> None:
        if self.session is not None and self.alive and not self.faults.silent:
            self.session.tell(response)

    def heard(self) -> bool:
        return self.session is None or not self.session.unacknowledged

    def break_stream(self) -> None:
        assert self.session is not None
        self.session.break_off()

    async def _heartbeats(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            if self.session is not None and not self.faults.silent:
                self.session.tell_unnumbered(worker_pb2.SessionResponse(load=self.load()))

    # ---- commands

    def _handle(self, request: worker_pb2.SessionRequest) -> None:
        match request.WhichOneof("command"):
            case "reserve":
                self.engine.reserve(request.reserve.work, self.load())
            case "prefill":
                self._tasks.append(asyncio.create_task(self.engine.prefill(request.prefill)))
            case "generate":
                self._tasks.append(asyncio.create_task(self.engine.generate(request.generate.work)))
            case "cancel":
                self.engine.cancel(request.cancel)
            case "set_roles":
                self.roles = tuple(request.set_roles.roles)
                result = worker_pb2.CommandResult(command_id=request.set_roles.command_id)
                self.tell(worker_pb2.SessionResponse(result=result))
            case "drain":
                self.draining = True
            case "kv_command":
                self._answer_kv(request.kv_command)

    def _answer_kv(self, command: worker_pb2.KvCommand) -> None:
        """Unnumbered, as real workers do."""
        result = self.kv_answer(command)
        if result is not None and self.session is not None:
            result.command_id = command.command_id
            self.session.tell_unnumbered(worker_pb2.SessionResponse(result=result))
