"""Owns what a scripted worker computes: the dispatches it holds, from their reservation over the hand-off to their last token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pdserve.v1 import types_pb2, worker_pb2
from tests.controller.twin_faults import Faults
from tests.controller.twin_tokens import TokenMouth, add_token

Name = tuple[int, int]  # request key, attempt


@dataclass
class Run:
    work: worker_pb2.Work
    next_index: dict[int, int]  # choices that go on -> next output index


class EngineHost(Protocol):
    """The worker whose engine it is."""

    faults: Faults

    def tell(self, response: worker_pb2.SessionResponse) -> None: ...

    def heard(self) -> bool:
        """Whether all that was told is acknowledged."""

    def break_stream(self) -> None: ...

    def die(self) -> None: ...


class TwinEngine:
    """peer: the engine at an address, of a worker that lives."""

    def __init__(
        self, host: EngineHost, peer: Callable[[str], TwinEngine | None], *, step_s: float, slots: int
    ) -> None:
        self.runs: dict[Name, Run] = {}
        self.reserved: dict[Name, worker_pb2.Work] = {}
        self.cancelled: set[Name] = set()
        self.steps = 0
        self._host = host
        self._peer = peer
        self._step_s = step_s
        self._slots = asyncio.Semaphore(slots)  # prompts computed at a time; the others wait
        self._mouth = TokenMouth(host)
        self._doomed = False
        self._dead = False

    def stop(self) -> None:
        """What it holds is forgotten, without a word."""
        self._dead = True
        self.runs.clear()
        self.reserved.clear()

    # ---- commands

    def cancel(self, cancel: worker_pb2.CancelDispatch) -> None:
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

    def reserve(self, work: worker_pb2.Work, load: worker_pb2.LoadReport) -> None:
        """`load`: goes along with the answer."""
        if self._host.faults.ignore_reserves:
            return
        result = worker_pb2.ReserveResult(dispatch=work.dispatch, load=load)
        if self._host.faults.refuse_reserves > 0:
            self._host.faults.refuse_reserves -= 1
            result.refused.reason = "no_capacity"
        elif _name(work.dispatch) not in self.cancelled:
            self.reserved[_name(work.dispatch)] = work
            result.granted.dispatch.CopyFrom(work.dispatch)
        self._host.tell(worker_pb2.SessionResponse(reserve=result))

    async def prefill(self, command: worker_pb2.Prefill) -> None:
        async with self._slots:
            await self._compute_and_hand_over(command)

    async def generate(self, work: worker_pb2.Work) -> None:
        async with self._slots:
            await self._compute_and_decode(work)

    # ---- prompts

    async def _compute_and_hand_over(self, command: worker_pb2.Prefill) -> None:
        work, name = command.work, _name(command.work.dispatch)
        if name in self.cancelled:
            return
        self._started(work)
        await self._survive(work)
        if self._host.faults.fail_prefills > 0:
            self._host.faults.fail_prefills -= 1
            self._failed(work, self._host.faults.fail_reason)
            return
        if self._host.faults.die_at_prefill:
            self._host.die()
            return
        going_on = self._first_tokens(work)
        peer = self._peer(command.decode_address)
        if name in self.cancelled:
            return
        if peer is None:
            self._failed(work, "transfer_failed")
        elif going_on:
            await asyncio.sleep(self._host.faults.hold_activation_s)
            peer.activate(work, going_on)
            if not self._host.faults.swallow_activation_report:
                self._report(work, worker_pb2.HANDOFF_STAGE_COMMITTED)
        else:
            peer.reserved.pop(name, None)

    def activate(self, work: worker_pb2.Work, going_on: dict[int, int]) -> None:
        """What the hand-off does at the decode worker."""
        if self.reserved.pop(_name(work.dispatch), None) is None or self._dead:
            return
        self.runs[_name(work.dispatch)] = Run(work, going_on)
        if not self._host.faults.swallow_activation_report:
            self._report(work, worker_pb2.HANDOFF_STAGE_ACTIVATED)

    async def _compute_and_decode(self, work: worker_pb2.Work) -> None:
        if _name(work.dispatch) in self.cancelled:
            return
        self._started(work)
        await self._survive(work)
        if self._host.faults.die_at_prefill:
            self._host.die()
            return
        going_on = self._first_tokens(work)
        if going_on and _name(work.dispatch) not in self.cancelled:
            self.runs[_name(work.dispatch)] = Run(work, going_on)

    async def _survive(self, work: worker_pb2.Work) -> None:
        """A real engine leaves its io process behind, which still says what the engine had begun. Nothing else of its step ends."""
        poison = self._host.faults.poison
        if poison and work.token_ids.startswith(poison):
            self._doomed = True
            while not self._host.heard():  # noqa: ASYNC110 (acknowledgements have no event)
                await asyncio.sleep(self._step_s)
            self._host.die()
        await asyncio.sleep(self._step_s)
        if self._doomed:
            await asyncio.Event().wait()  # until the death cancels this task

    # ---- tokens

    def _first_tokens(self, work: worker_pb2.Work) -> dict[int, int]:
        """Sends them; gives the choices that go on."""
        if work.sampling.HasField("prompt_logprobs"):
            rows = [types_pb2.TokenLogprobs(token_ids=[1], logprobs=[-0.5])] * (work.prompt_tokens - 1)
            message = worker_pb2.PromptLogprobs(dispatch=work.dispatch, positions=rows)
            self._host.tell(worker_pb2.SessionResponse(tokens=worker_pb2.TokenBatch(prompt_logprobs=[message])))
        batch, index = worker_pb2.TokenBatch(), len(work.token_ids) // 4 - work.prompt_tokens
        going_on = {choice: index + 1 for choice in work.choices if not add_token(batch, work, choice, index)}
        hold_s = self._host.faults.hold_first_token_s
        if hold_s:
            asyncio.get_running_loop().call_later(hold_s, self._mouth.tell, batch)
        else:
            self._mouth.tell(batch)
        return going_on

    async def decode_loop(self) -> None:
        """One token for everything that runs, step after step, until it is cancelled."""
        while True:
            await asyncio.sleep(self._step_s)
            if self._host.faults.hang_engine or not self.runs:
                continue
            self.steps += 1
            batch = worker_pb2.TokenBatch(step=self.steps)
            for name, run in list(self.runs.items()):
                for choice, index in list(run.next_index.items()):
                    if add_token(batch, run.work, choice, index):
                        del run.next_index[choice]
                    else:
                        run.next_index[choice] = index + 1
                if not run.next_index:
                    del self.runs[name]
            self._mouth.tell(batch)

    # ---- reports

    def _started(self, work: worker_pb2.Work) -> None:
        started = worker_pb2.DispatchStarted(dispatch=work.dispatch, cached_tokens=16, queue_us=10)
        started.blended_tokens = sum(chunk.count for chunk in work.chunks)
        self._host.tell(worker_pb2.SessionResponse(started=started))

    def _failed(self, work: worker_pb2.Work, reason: str) -> None:
        failed = worker_pb2.DispatchFailed(dispatch=work.dispatch, reason=reason, message="scripted")
        self._host.tell(worker_pb2.SessionResponse(failed=failed))

    def _report(self, work: worker_pb2.Work, stage: worker_pb2.HandoffStage.ValueType) -> None:
        report = worker_pb2.HandoffReport(dispatch=work.dispatch, stage=stage, transport="tcp", bytes=1000)
        self._host.tell(worker_pb2.SessionResponse(handoff=report))


def _name(dispatch: types_pb2.DispatchId) -> Name:
    return dispatch.request_key, dispatch.attempt
