"""Owns a scripted worker: a real gRPC server that speaks WorkerService with deterministic tokens and switchable faults.

Twins of one fleet hand over among themselves by address. A token depends on (prompt, seed, choice, index) alone, as with real
engines, so that a disturbed run must bring the same ids as an undisturbed one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc

from pdserve.v1 import membership_pb2, types_pb2, worker_pb2, worker_pb2_grpc

VOCAB = 256
PREFILL, DECODE = types_pb2.ROLE_PREFILL, types_pb2.ROLE_DECODE
Name = tuple[int, int]  # request key, attempt
_INCARNATIONS = iter(range(1, 10**9))


def token_of(prompt: bytes, seed: int, choice: int, index: int) -> int:
    """Printable ASCII, so that byte-sized ids are text."""
    digest = hashlib.blake2b(prompt, digest_size=8, key=f"{seed}/{choice}/{index}".encode()).digest()
    return 97 + digest[0] % 26


def tokens_of(prompt: bytes, seed: int, choice: int, count: int) -> list[int]:
    return [token_of(prompt, seed, choice, index) for index in range(count)]


@dataclass
class Faults:
    """All off. Counters count down as they are used."""

    refuse_reserves: int = 0
    ignore_reserves: bool = False
    die_at_prefill: bool = False
    poison: bytes = b""  # dies when it computes a prompt that begins so
    fail_prefills: int = 0
    fail_reason: str = "transfer_failed"
    die_after_tokens: int | None = None
    swallow_activation_report: bool = False
    duplicate: bool = False
    reorder: bool = False
    hold_first_token_s: float = 0.0
    hold_activation_s: float = 0.0
    silent: bool = False
    hang_engine: bool = False
    reset_after_tokens: int | None = None  # the stream breaks once, the process lives


@dataclass
class Run:
    work: worker_pb2.Work
    next_index: dict[int, int]  # choices that go on -> next output index


@dataclass
class TwinSession:
    controller_id: str
    unacknowledged: deque[worker_pb2.SessionResponse] = field(default_factory=deque)
    next_sequence: int = 1
    queue: asyncio.Queue[worker_pb2.SessionResponse | None] = field(default_factory=asyncio.Queue)
    opened: int = 0


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
        self.runs: dict[Name, Run] = {}
        self.reserved: dict[Name, worker_pb2.Work] = {}
        self.cancelled: set[Name] = set()
        self.acknowledged = 0
        self.draining = False
        self.tiers: list[worker_pb2.TierReport] = []
        self.prefill_token_us = 0.0
        self.layers = 12
        self.kv_answer: Callable[[worker_pb2.KvCommand], worker_pb2.CommandResult | None] = lambda command: None
        self.steps = 0
        self._fleet = fleet
        self._step_s = step_s
        self._blocks = blocks
        self._max_batch = max_batch
        self._max_context = max_context
        self._identity = identity
        self._transports = transports
        self._slots = asyncio.Semaphore(slots)  # prompts computed at a time; the others wait
        self.session: TwinSession | None = None
        self._server: grpc.aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._held_back: worker_pb2.SessionResponse | None = None
        self._tokens_sent = 0
        self._doomed = False

    # ---- life

    async def start(self) -> None:
        self._server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self.address = f"127.0.0.1:{port}"
        self._fleet[self.address] = self
        self._tasks = [asyncio.create_task(self._heartbeats()), asyncio.create_task(self._decode_loop())]

    async def kill(self) -> None:
        """As SIGKILL looks to the others: the port refuses, streams are reset, nothing is said."""
        self._fleet.pop(self.address, None)
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            if task is not asyncio.current_task():
                task.cancel()
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)
        self.runs.clear()
        self.reserved.clear()

    def _die(self) -> None:
        self._dying = asyncio.create_task(self.kill())

    @property
    def alive(self) -> bool:
        return self._server is not None

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
        session.opened += 1
        session.queue = asyncio.Queue()
        reader = asyncio.create_task(self._read(request_iterator, session))
        try:
            yield worker_pb2.SessionResponse(snapshot=self._snapshot())
            for response in list(session.unacknowledged):
                yield response
            queue = session.queue
            while (response_or_end := await queue.get()) is not None:
                yield response_or_end
        finally:
            reader.cancel()

    def _snapshot(self) -> worker_pb2.WorkerSnapshot:
        held = [worker_pb2.HeldDispatch(dispatch=run.work.dispatch) for run in self.runs.values()]
        held += [worker_pb2.HeldDispatch(dispatch=work.dispatch) for work in self.reserved.values()]
        return worker_pb2.WorkerSnapshot(worker=self.info(), load=self.load(), held=held, draining=self.draining)

    async def _read(self, requests: AsyncIterator[worker_pb2.SessionRequest], session: TwinSession) -> None:
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.UsageError):
            async for request in requests:
                if request.WhichOneof("command") == "ack":
                    self._acknowledge(session, request.ack.sequence)
                else:
                    self.commands.append(request)
                    self._handle(request)

    def _acknowledge(self, session: TwinSession, sequence: int) -> None:
        self.acknowledged = max(self.acknowledged, sequence)
        while session.unacknowledged and session.unacknowledged[0].sequence <= sequence:
            session.unacknowledged.popleft()

    def tell(self, response: worker_pb2.SessionResponse) -> None:
        if self.session is None or self._server is None or self.faults.silent:
            return
        response.sequence = self.session.next_sequence
        self.session.next_sequence += 1
        self.session.unacknowledged.append(response)
        self.session.queue.put_nowait(response)

    def break_stream(self) -> None:
        assert self.session is not None
        self.session.queue.put_nowait(None)

    async def _heartbeats(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            if self.session is not None and not self.faults.silent:
                self.session.queue.put_nowait(worker_pb2.SessionResponse(load=self.load()))

    # ---- commands

    def _handle(self, request: worker_pb2.SessionRequest) -> None:
        match request.WhichOneof("command"):
            case "reserve":
                self._reserve(request.reserve.work)
            case "prefill":
                self._tasks.append(asyncio.create_task(self._prefill(request.prefill)))
            case "generate":
                self._tasks.append(asyncio.create_task(self._generate(request.generate.work)))
            case "cancel":
                self._cancel(request.cancel)
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
            self.session.queue.put_nowait(worker_pb2.SessionResponse(result=result))

    def _cancel(self, cancel: worker_pb2.CancelDispatch) -> None:
        name = _name(cancel.dispatch)
        run = self.runs.get(name)
        if run is not None:
            for choice in list(cancel.choices) or list(run.next_index):
                run.next_index.pop(choice, None)
            if run.next_index:
                return
        self.cancelled.add(name)
        self.runs.pop(name, None)
        self.reserved.pop(name, None)

    def _reserve(self, work: worker_pb2.Work) -> None:
        if self.faults.ignore_reserves:
            return
        result = worker_pb2.ReserveResult(dispatch=work.dispatch)
        if self.faults.refuse_reserves > 0:
            self.faults.refuse_reserves -= 1
            result.refused.reason = "no_capacity"
        elif _name(work.dispatch) not in self.cancelled:
            self.reserved[_name(work.dispatch)] = work
            result.granted.dispatch.CopyFrom(work.dispatch)
        result.load.CopyFrom(self.load())
        self.tell(worker_pb2.SessionResponse(reserve=result))

    async def _prefill(self, command: worker_pb2.Prefill) -> None:
        async with self._slots:
            await self._compute_and_hand_over(command)

    async def _compute_and_hand_over(self, command: worker_pb2.Prefill) -> None:
        work, name = command.work, _name(command.work.dispatch)
        if name in self.cancelled:
            return
        self._started(work)
        await self._survive(work)
        if self.faults.fail_prefills > 0:
            self.faults.fail_prefills -= 1
            self._failed(work, self.faults.fail_reason)
            return
        if self.faults.die_at_prefill:
            self._die()
            return
        going_on = self._first_tokens(work)
        peer = self._fleet.get(command.decode_address)
        if name in self.cancelled:
            return
        if peer is None:
            self._failed(work, "transfer_failed")
        elif going_on:
            await asyncio.sleep(self.faults.hold_activation_s)
            peer.activate(work, going_on)
            if not self.faults.swallow_activation_report:
                self._report(work, worker_pb2.HANDOFF_STAGE_COMMITTED)
        else:
            peer.reserved.pop(name, None)

    def activate(self, work: worker_pb2.Work, going_on: dict[int, int]) -> None:
        """What the hand-off does at the decode worker."""
        if self.reserved.pop(_name(work.dispatch), None) is None or self._server is None:
            return
        self.runs[_name(work.dispatch)] = Run(work, going_on)
        if not self.faults.swallow_activation_report:
            self._report(work, worker_pb2.HANDOFF_STAGE_ACTIVATED)

    async def _generate(self, work: worker_pb2.Work) -> None:
        async with self._slots:
            await self._compute_and_decode(work)

    async def _compute_and_decode(self, work: worker_pb2.Work) -> None:
        if _name(work.dispatch) in self.cancelled:
            return
        self._started(work)
        await self._survive(work)
        if self.faults.die_at_prefill:
            self._die()
            return
        going_on = self._first_tokens(work)
        if going_on and _name(work.dispatch) not in self.cancelled:
            self.runs[_name(work.dispatch)] = Run(work, going_on)

    async def _survive(self, work: worker_pb2.Work) -> None:
        """A real engine leaves its io process behind, which still says what the engine had begun. Nothing else of its step ends."""
        if self.faults.poison and work.token_ids.startswith(self.faults.poison):
            self._doomed = True
            session = self.session
            while session is not None and session.unacknowledged:  # noqa: ASYNC110 (acknowledgements have no event)
                await asyncio.sleep(self._step_s)
            self._die()
        await asyncio.sleep(self._step_s)
        if self._doomed:
            await asyncio.Event().wait()  # until the death cancels this task

    # ---- tokens

    def _first_tokens(self, work: worker_pb2.Work) -> dict[int, int]:
        """Sends them; gives the choices that go on."""
        if work.sampling.HasField("prompt_logprobs"):
            rows = [types_pb2.TokenLogprobs(token_ids=[1], logprobs=[-0.5])] * (work.prompt_tokens - 1)
            message = worker_pb2.PromptLogprobs(dispatch=work.dispatch, positions=rows)
            self.tell(worker_pb2.SessionResponse(tokens=worker_pb2.TokenBatch(prompt_logprobs=[message])))
        batch, index = worker_pb2.TokenBatch(), len(work.token_ids) // 4 - work.prompt_tokens
        going_on = {choice: index + 1 for choice in work.choices if not self._column(batch, work, choice, index)}
        if self.faults.hold_first_token_s:
            loop = asyncio.get_running_loop()
            loop.call_later(self.faults.hold_first_token_s, self._tell_tokens, batch)
        else:
            self._tell_tokens(batch)
        return going_on

    async def _decode_loop(self) -> None:
        while True:
            await asyncio.sleep(self._step_s)
            if self.faults.hang_engine or not self.runs:
                continue
            self.steps += 1
            batch = worker_pb2.TokenBatch(step=self.steps)
            for name, run in list(self.runs.items()):
                for choice, index in list(run.next_index.items()):
                    if self._column(batch, run.work, choice, index):
                        del run.next_index[choice]
                    else:
                        run.next_index[choice] = index + 1
                if not run.next_index:
                    del self.runs[name]
            self._tell_tokens(batch)

    def _column(self, batch: worker_pb2.TokenBatch, work: worker_pb2.Work, choice: int, index: int) -> bool:
        """True if the choice ends with it."""
        prompt = work.token_ids[: work.prompt_tokens * 4]
        token = token_of(prompt, work.sampling.seed, choice, index)
        last = index + 1 >= work.sampling.max_tokens
        stops = token in work.sampling.stop_token_ids and index + 1 > work.sampling.min_tokens
        batch.request_keys.append(work.dispatch.request_key)
        batch.attempts.append(work.dispatch.attempt)
        batch.choices.append(choice)
        batch.indices.append(index)
        batch.token_ids.append(token)
        finish = types_pb2.FINISH_REASON_STOP if stops else types_pb2.FINISH_REASON_LENGTH if last else 0
        batch.finish_reasons.append(finish)  # type: ignore[arg-type]
        if work.sampling.HasField("logprobs"):
            batch.logprobs.append(types_pb2.TokenLogprobs(token_ids=[token], logprobs=[-float(index)]))
        return stops or last

    def _tell_tokens(self, batch: worker_pb2.TokenBatch) -> None:
        response = worker_pb2.SessionResponse(tokens=batch)
        self._tokens_sent += len(batch.token_ids)
        if self.faults.reorder:
            if self._held_back is None:
                self._held_back = response
                asyncio.get_running_loop().call_later(0.02, self._release)
                return
            self.tell(response)
            self._release()
        else:
            self.tell(response)
        if self.faults.duplicate:
            copy = worker_pb2.SessionResponse()
            copy.CopyFrom(response)
            self.tell(copy)
        self._break_if_due()

    def _release(self) -> None:
        if self._held_back is not None:
            held, self._held_back = self._held_back, None
            self.tell(held)

    def _break_if_due(self) -> None:
        faults = self.faults
        if faults.die_after_tokens is not None and self._tokens_sent >= faults.die_after_tokens:
            self._die()
        elif faults.reset_after_tokens is not None and self._tokens_sent >= faults.reset_after_tokens:
            faults.reset_after_tokens = None
            self.break_stream()

    # ---- reports

    def _started(self, work: worker_pb2.Work) -> None:
        started = worker_pb2.DispatchStarted(dispatch=work.dispatch, cached_tokens=16, queue_us=10)
        started.blended_tokens = sum(chunk.count for chunk in work.chunks)
        self.tell(worker_pb2.SessionResponse(started=started))

    def _failed(self, work: worker_pb2.Work, reason: str) -> None:
        failed = worker_pb2.DispatchFailed(dispatch=work.dispatch, reason=reason, message="scripted")
        self.tell(worker_pb2.SessionResponse(failed=failed))

    def _report(self, work: worker_pb2.Work, stage: worker_pb2.HandoffStage.ValueType) -> None:
        report = worker_pb2.HandoffReport(dispatch=work.dispatch, stage=stage, transport="tcp", bytes=1000)
        self.tell(worker_pb2.SessionResponse(handoff=report))


def _name(dispatch: types_pb2.DispatchId) -> Name:
    return dispatch.request_key, dispatch.attempt
