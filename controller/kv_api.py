"""Owns the gRPC KvService of the controller: the operators' view of the KV tiers, as messages."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import groupby
from typing import Protocol, TypeAlias

import grpc

from controller.kv_operations import (
    HOLD_MOST_S,
    PAGES_LISTED,
    PAGES_LISTED_MOST,
    VERIFY_BYTES,
    VERIFY_MOST_S,
    VERIFY_S,
    KvOperations,
    OutcomeStatus,
    PageStatus,
    Prompt,
    Selection,
    Silence,
    TierStatus,
    VerifyBounds,
    WorkerTiers,
)
from kv_transfer.keys import TOKEN_BYTES
from pdserve.errors import InvalidRequest
from pdserve.v1 import kv_pb2, kv_pb2_grpc, worker_pb2


class PromptTokenizer(Protocol):
    def encode(self, text: str, *, add_special_tokens: bool) -> bytes: ...


_Stat: TypeAlias = "grpc.aio.ServicerContext[kv_pb2.KvStatRequest, kv_pb2.KvStatResponse]"
_Pages: TypeAlias = "grpc.aio.ServicerContext[kv_pb2.KvPagesRequest, kv_pb2.KvPagesResponse]"
_Explain: TypeAlias = "grpc.aio.ServicerContext[kv_pb2.KvExplainRequest, kv_pb2.KvExplainResponse]"
_Pin: TypeAlias = "grpc.aio.ServicerContext[kv_pb2.KvPinRequest, kv_pb2.KvPinResponse]"
_Flush: TypeAlias = "grpc.aio.ServicerContext[kv_pb2.KvFlushRequest, kv_pb2.KvFlushResponse]"
_Verify: TypeAlias = "grpc.aio.ServicerContext[kv_pb2.KvVerifyRequest, kv_pb2.KvVerifyResponse]"


class KvApi(kv_pb2_grpc.KvServiceServicer):
    def __init__(self, kv: KvOperations, tokenizer: PromptTokenizer, threads: ThreadPoolExecutor) -> None:
        self._kv = kv
        self._tokenizer = tokenizer
        self._threads = threads

    async def Stat(  # noqa: N802 (the name is gRPC's)
        self, request: kv_pb2.KvStatRequest, context: _Stat
    ) -> kv_pb2.KvStatResponse:
        return kv_pb2.KvStatResponse(workers=[_worker_tiers(worker) for worker in self._kv.stat().workers])

    async def Pages(  # noqa: N802
        self, request: kv_pb2.KvPagesRequest, context: _Pages
    ) -> kv_pb2.KvPagesResponse:
        limit = request.limit or PAGES_LISTED
        if limit > PAGES_LISTED_MOST:
            raise InvalidRequest(f"limit: at most {PAGES_LISTED_MOST}.", param="limit")
        found = await self._kv.pages(await self._selection(request.selection), limit)
        workers = [
            kv_pb2.WorkerPages(worker_id=worker, pages=[_page(page) for page in pages])
            for worker, pages in groupby(found.pages, key=lambda page: page.worker)
        ]
        return kv_pb2.KvPagesResponse(workers=workers, silent=_silent(found.silent))

    async def Explain(  # noqa: N802
        self, request: kv_pb2.KvExplainRequest, context: _Explain
    ) -> kv_pb2.KvExplainResponse:
        explained = await self._kv.explain(await self._prompt(request.prompt))
        return kv_pb2.KvExplainResponse(
            prompt_tokens=explained.prompt_tokens,
            keyed_tokens=explained.keyed_tokens,
            workers=[
                kv_pb2.WorkerHolding(worker_id=each.worker, tokens=each.tokens, reusable_tokens=each.reusable_tokens)
                for each in explained.workers
            ],
            silent=_silent(explained.silent),
        )

    async def Pin(  # noqa: N802
        self, request: kv_pb2.KvPinRequest, context: _Pin
    ) -> kv_pb2.KvPinResponse:
        if not 0 <= request.hold_s <= HOLD_MOST_S:
            raise InvalidRequest(f"hold_s must be 0 to {HOLD_MOST_S:.0f} seconds.", param="hold_s")
        done = await self._kv.pin(await self._selection(request.selection), request.hold_s)
        return kv_pb2.KvPinResponse(outcomes=_outcomes(done.outcomes), silent=_silent(done.silent))

    async def Flush(  # noqa: N802
        self, request: kv_pb2.KvFlushRequest, context: _Flush
    ) -> kv_pb2.KvFlushResponse:
        done = await self._kv.flush(await self._selection(request.selection))
        return kv_pb2.KvFlushResponse(outcomes=_outcomes(done.outcomes), silent=_silent(done.silent))

    async def Verify(  # noqa: N802
        self, request: kv_pb2.KvVerifyRequest, context: _Verify
    ) -> kv_pb2.KvVerifyResponse:
        if not 0 <= request.deadline_s <= VERIFY_MOST_S:
            raise InvalidRequest(f"deadline_s must be 0 to {VERIFY_MOST_S:g} seconds.", param="deadline_s")
        bounds = VerifyBounds(request.deadline_s or VERIFY_S, request.max_bytes or VERIFY_BYTES, request.after)
        done = await self._kv.verify(await self._selection(request.selection), bounds)
        return kv_pb2.KvVerifyResponse(outcomes=_outcomes(done.outcomes), silent=_silent(done.silent))

    # ---- parts

    async def _selection(self, message: kv_pb2.KvSelection) -> Selection:
        prompt = await self._prompt(message.prompt) if message.HasField("prompt") else None
        return Selection(message.worker_id, message.tier, tuple(message.keys), prompt)

    async def _prompt(self, message: kv_pb2.KvPrompt) -> Prompt:
        token_ids = message.token_ids
        if message.WhichOneof("prompt") == "text":
            token_ids = await asyncio.get_running_loop().run_in_executor(self._threads, self._encode, message.text)
        if not token_ids or len(token_ids) % TOKEN_BYTES:
            raise InvalidRequest("prompt: give a text, or token ids of 4 bytes each.", param="prompt")
        return Prompt(token_ids, message.cache_salt)

    def _encode(self, text: str) -> bytes:
        return self._tokenizer.encode(text, add_special_tokens=True)


def _worker_tiers(worker: WorkerTiers) -> kv_pb2.WorkerTiers:
    return kv_pb2.WorkerTiers(
        worker_id=worker.worker,
        block_tokens=worker.block_tokens,
        device_tokens=worker.device_tokens,
        device_free_tokens=worker.device_free_tokens,
        device_query_tokens=worker.device_query_tokens,
        device_hit_tokens=worker.device_hit_tokens,
        held_tokens=worker.held_tokens,
        tiers=[_tier(tier) for tier in worker.tiers],
        loads=worker_pb2.TierLoads(**asdict(worker.loads)),
    )


def _tier(tier: TierStatus) -> worker_pb2.TierReport:
    """The fields have the same names on both sides; None is an absent one."""
    return worker_pb2.TierReport(**asdict(tier))


def _page(page: PageStatus) -> worker_pb2.KvPage:
    return worker_pb2.KvPage(
        key=bytes.fromhex(page.key),
        parent=bytes.fromhex(page.parent),
        tier=page.tier,
        bytes=page.size_bytes,
        age_s=page.age_s,
        refs=page.refs,
        held_s=page.held_s,
    )


def _outcomes(outcomes: Sequence[OutcomeStatus]) -> list[kv_pb2.WorkerOutcome]:
    return [
        kv_pb2.WorkerOutcome(
            worker_id=each.worker,
            outcome=worker_pb2.TierOutcome(
                tier=each.tier,
                pages=each.pages,
                bad=each.bad,
                bytes=each.checked_bytes,
                cut=each.cut,
                last_key=bytes.fromhex(each.last_key),
                bad_keys=bytes.fromhex("".join(each.bad_keys)),
                failure=each.failure,
            ),
        )
        for each in outcomes
    ]


def _silent(silent: Sequence[Silence]) -> list[kv_pb2.KvSilence]:
    return [kv_pb2.KvSilence(worker_id=each.worker, reason=each.reason, message=each.message) for each in silent]
