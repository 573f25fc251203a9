"""Owns the in-memory twins of what stands behind the HTTP API: a scripted generator and an operator's desk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from controller.blend_gate import BlendGate
from controller.kv_operations import (
    KvExplanation,
    KvOutcome,
    KvPages,
    KvStat,
    LoadsStatus,
    OutcomeStatus,
    PageStatus,
    Prompt,
    Selection,
    Silence,
    TierStatus,
    VerifyBounds,
    WorkerHolding,
    WorkerTiers,
)
from controller.operations import ClusterStatus, RequestSummary, RequestTimeline, RoleName, WorkerStatus
from controller.placement.decision import Candidate, Decision, Pick
from controller.request import Begun, Delta, GenerationRequest, Logprobs
from pdserve.errors import NotFound
from tests.controller.blend_twins import open_gate
from tokenization.detokenizer import Detokenizer
from tokenization.stop_strings import StopMatcher
from tokenization.tokenizer import Tokenizer, ids_from_bytes

OUTPUT = "café 你好 🙂 the quick brown fox jumps over naïve text\n"


@dataclass(slots=True)
class Script:
    """How the next requests go."""

    output: str = OUTPUT
    begin_after_s: float = 0.0
    fail_first: Exception | None = None  # instead of Begun
    fail_after: tuple[int, Exception] | None = None  # after so many tokens
    hang_after: int | None = None  # for ever, after so many tokens
    cached_tokens: int = 3


@dataclass(slots=True)
class GeneratorTwin:
    """Deterministic: every choice says the script's output, over and over, one token per step."""

    tokenizer: Tokenizer
    script: Script = field(default_factory=Script)
    requests: list[GenerationRequest] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    live: set[str] = field(default_factory=set)

    def reset(self) -> None:
        self.script = Script()
        self.requests.clear()
        self.closed.clear()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Begun | Delta]:
        assert request.request_id not in self.live, "two live requests with one id"
        self.requests.append(request)
        self.live.add(request.request_id)
        script = self.script
        try:
            await asyncio.sleep(script.begin_after_s)
            if script.fail_first is not None:
                raise script.fail_first
            blended = sum(chunk.end - chunk.start for chunk in request.kv_blend.chunks) if request.kv_blend else 0
            yield Begun(script.cached_tokens, self._prompt_logprobs(request), blended)
            voices = [_Voice(self.tokenizer, request, choice, script.output) for choice in range(request.n)]
            for step in range(request.sampling.max_tokens):
                if script.fail_after is not None and step >= script.fail_after[0]:
                    raise script.fail_after[1]
                if script.hang_after is not None and step >= script.hang_after:
                    await asyncio.Event().wait()
                for voice in voices:
                    if not voice.done:
                        yield voice.step(step)
                if all(voice.done for voice in voices):
                    break
                await asyncio.sleep(0)
        finally:
            self.live.discard(request.request_id)
            self.closed.append(request.request_id)

    async def cancel(self, request_id: str) -> bool:
        return request_id in self.live

    def _prompt_logprobs(self, request: GenerationRequest) -> tuple[Logprobs, ...]:
        if request.sampling.prompt_logprobs is None:
            return ()
        ids = ids_from_bytes(request.token_ids)
        return (Logprobs((), ()), *(_logprobs(token, request.sampling.prompt_logprobs) for token in ids[1:]))


class _Voice:
    def __init__(self, tokenizer: Tokenizer, request: GenerationRequest, choice: int, output: str) -> None:
        self._tokens = ids_from_bytes(tokenizer.encode(output, add_special_tokens=False))
        self._request = request
        self._choice = choice
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopMatcher(request.stop, include_stop=request.include_stop_text)
        self.done = False

    def step(self, step: int) -> Delta:
        sampling = self._request.sampling
        token = self._tokens[step % len(self._tokens)]
        result = self._stops.feed(self._detokenizer.feed((token,)))
        delta = Delta(self._choice, step, (token,), result.text)
        if sampling.logprobs is not None:
            delta = replace(delta, logprobs=(_logprobs(token, sampling.logprobs),))
        if result.stop is not None:
            delta = replace(delta, finish_reason="stop", stop_reason=result.stop)
        elif token in sampling.stop_token_ids:
            delta = replace(delta, finish_reason="stop", stop_reason=token)
        elif step + 1 == sampling.max_tokens:
            rest = self._stops.feed(self._detokenizer.flush()).text + self._stops.flush()
            delta = replace(delta, finish_reason="length", text=delta.text + rest)
        self.done = delta.finish_reason is not None
        return delta


def _logprobs(token: int, alternatives: int) -> Logprobs:
    others = tuple(range(10, 10 + alternatives))
    return Logprobs((token, *others), (-0.5, *(-1.0 - place for place in range(alternatives))))


WORKER = WorkerStatus(
    id="p0", roles=("prefill",), state="READY", pid=10, engine_pid=11, address="127.0.0.1:1", version="0.1.0",
    incarnation="18446744073709551615", kv_endpoints=(), blocks_total=64, blocks_free=60, blocks_leaked=0,
    reserved_blocks=0, running=1, waiting=0, waiting_tokens=0, dispatches=1, step_ms=1.5, engine_step=7, stalled=False,
    prefix_queries=0, prefix_hits=0, preemptions=0, verify_failures=0, expired_leases=0, resident_bytes=1 << 20,
    silent_s=0.1, lost_reason="",
)  # fmt: skip
SUMMARY = RequestSummary(
    request_id="r1", state="FINISHED", arrived_unix_s=1.0, prompt_tokens=3, output_tokens=4, choices=1, attempts=1,
    ttft_s=0.01, total_s=0.02, finish_reasons=("stop",), error="", error_message="", prefill_worker="p0",
    decode_worker="d0", transport="tcp",
)  # fmt: skip
_CANDIDATE = Candidate("split", "p0", "d0", "tcp", 0.5, {"queue": 0.5}, "", "")
TIMELINE = RequestTimeline(
    "r1",
    SUMMARY,
    0,
    (),
    (),
    (Decision(1, 0.0, "least-loaded", "only", Pick("split", "p0", "d0", "tcp"), (_CANDIDATE,), 0),),
)


_TIER = TierStatus(
    tier="host", capacity_bytes=100, used_bytes=50, pages=1, hit_tokens=16, miss_tokens=0, bytes_in=50, bytes_out=50,
    read_s=0.1, read_pages=1, write_s=0.1, stored=1, evicted=0, evicted_age_s=0.0, expired=0, dropped=0, failures=0,
    verify_failures={"checksum": 1},
)  # fmt: skip
TIERS = WorkerTiers(
    worker="p0", block_tokens=16, device_tokens=1024, device_free_tokens=512, device_query_tokens=100,
    device_hit_tokens=50, held_tokens={"device": 64}, tiers=(_TIER,),
    loads=LoadsStatus(100, {"host": 16}, 0, 0, 0, 0, 0, 0.1),
)  # fmt: skip
PAGE = PageStatus("p0", "host", "ab" * 32, "", 50, 1.5, 0, 0.0)


@dataclass(slots=True)
class KvTwin:
    """One worker with one page in its host tier."""

    asked: list[tuple[str, Selection | Prompt, float]] = field(default_factory=list)

    def stat(self) -> KvStat:
        return KvStat((TIERS,))

    async def pages(self, selection: Selection, limit: int) -> KvPages:
        self._check("pages", selection, limit)
        return KvPages((PAGE,)[:limit], (Silence("d0", "timeout", "The worker did not answer."),))

    async def explain(self, prompt: Prompt) -> KvExplanation:
        self.asked.append(("explain", prompt, 0.0))
        tokens = len(prompt.token_ids) // 4
        return KvExplanation(tokens, tokens // 16 * 16, (WorkerHolding("p0", {"device": 16, "host": 0}, 16),), ())

    async def pin(self, selection: Selection, hold_s: float) -> KvOutcome:
        return self._check("pin", selection, hold_s)

    async def flush(self, selection: Selection) -> KvOutcome:
        return self._check("flush", selection)

    async def verify(self, selection: Selection, bounds: VerifyBounds) -> KvOutcome:
        return self._check("verify", selection, bounds.deadline_s)

    def _check(self, action: str, selection: Selection, amount: float = 0.0) -> KvOutcome:
        self.asked.append((action, selection, amount))
        if selection.worker_id not in ("", "p0"):
            raise NotFound(f"There is no worker {selection.worker_id!r}.")
        return KvOutcome((OutcomeStatus("p0", "host", 1, 1, 50, True, "ab" * 32, ("cd" * 32,), ""),), ())


@dataclass(slots=True)
class OperationsTwin:
    """One worker, one finished request."""

    workers: tuple[WorkerStatus, ...] = (WORKER,)
    kv: KvTwin = field(default_factory=KvTwin)
    blends: BlendGate = field(default_factory=open_gate)

    def reset(self) -> None:
        self.workers = (WORKER,)
        self.kv.asked.clear()

    def status(self) -> ClusterStatus:
        return ClusterStatus(
            "http://127.0.0.1:1", "127.0.0.1:2", "c0", 1, "tiny", "0.1.0", 1.0, False, 0, 0, self.workers,
            self.blends.status(),
        )  # fmt: skip

    def requests(self, limit: int) -> tuple[RequestSummary, ...]:
        return (SUMMARY,)[:limit]

    def request(self, request_id: str) -> RequestTimeline | None:
        return TIMELINE if request_id == SUMMARY.request_id else None

    async def set_roles(self, worker_id: str, roles: tuple[RoleName, ...]) -> WorkerStatus:
        worker = replace(self._worker(worker_id), roles=roles)
        self.workers = (worker,)
        return worker

    async def drain(self, worker_id: str) -> WorkerStatus:
        return replace(self._worker(worker_id), state="DRAINING")

    def _worker(self, worker_id: str) -> WorkerStatus:
        for worker in self.workers:
            if worker.id == worker_id:
                return worker
        raise NotFound(f"There is no worker {worker_id!r}.")
