"""Owns /api/v1/kv: what the KV tiers hold, where a prompt lies, pins, flushes and checks."""

from __future__ import annotations

from typing import Annotated

import orjson
from fastapi import APIRouter, Query, Request, Response

from controller.http_api.context import ApiContext
from controller.http_api.field_types import PromptInput
from controller.http_api.json_body import read_body
from controller.http_api.kv_bodies import KvExplainBody, KvFlushBody, KvPinBody, KvSelectionBody, KvVerifyBody
from controller.http_api.openapi import KEYED, WITH_BODY, error_answers, json_body
from controller.kv_operations import (
    PAGES_LISTED,
    PAGES_LISTED_MOST,
    KvExplanation,
    KvOutcome,
    KvPages,
    KvStat,
    Prompt,
    Selection,
    VerifyBounds,
)

_STEERED = error_answers(*WITH_BODY, *KEYED, 404, 429, 503)


def kv_router(context: ApiContext) -> APIRouter:
    router = APIRouter(prefix="/api/v1/kv", tags=["operators"])
    kv = context.operations.kv

    @router.get("", responses={200: {"model": KvStat}, **error_answers(*KEYED)})
    async def stat() -> Response:
        """Figures of every tier of every worker."""
        return _json(kv.stat())

    @router.get("/pages", responses={200: {"model": KvPages}, **error_answers(*KEYED, 400, 404, 429, 503, 504)})
    async def pages(
        worker: Annotated[str, Query(max_length=256)] = "",
        tier: Annotated[str, Query(max_length=64)] = "",
        limit: Annotated[int, Query(ge=1, le=PAGES_LISTED_MOST)] = PAGES_LISTED,
    ) -> Response:
        """Pages below the device, of each tier the newest ones."""
        return _json(await kv.pages(Selection(worker, tier), limit))

    @router.post(
        "/explain",
        responses={200: {"model": KvExplanation}, **error_answers(*WITH_BODY, *KEYED, 503)},
        openapi_extra=json_body(KvExplainBody),
    )
    async def explain(request: Request) -> Response:
        """Where a prompt's KV lies, on every worker, by tier."""
        body = await read_body(request, KvExplainBody)
        return _json(await kv.explain(await _prompt(context, body.prompt, body.cache_salt)))

    @router.post("/pin", responses={200: {"model": KvOutcome}, **_STEERED}, openapi_extra=json_body(KvPinBody))
    async def pin(request: Request) -> Response:
        """Keeps pages from eviction and expiry for a time."""
        body = await read_body(request, KvPinBody)
        return _json(await kv.pin(await _selection(context, body), body.hold_s))

    @router.post("/flush", responses={200: {"model": KvOutcome}, **_STEERED}, openapi_extra=json_body(KvFlushBody))
    async def flush(request: Request) -> Response:
        """Drops pages. `{}` drops everything, the prefix cache on the devices too."""
        body = await read_body(request, KvFlushBody)
        return _json(await kv.flush(await _selection(context, body)))

    @router.post("/verify", responses={200: {"model": KvOutcome}, **_STEERED}, openapi_extra=json_body(KvVerifyBody))
    async def verify(request: Request) -> Response:
        """Compares pages with what was stored; bad ones are dropped."""
        body = await read_body(request, KvVerifyBody)
        bounds = VerifyBounds(body.deadline_s, body.max_bytes, bytes.fromhex(body.after or ""))
        return _json(await kv.verify(await _selection(context, body), bounds))

    return router


async def _selection(context: ApiContext, body: KvSelectionBody) -> Selection:
    keys = tuple(bytes.fromhex(key) for key in body.keys)
    prompt = await _prompt(context, body.prompt, body.cache_salt) if body.prompt is not None else None
    return Selection(body.worker, body.tier, keys, prompt)


async def _prompt(context: ApiContext, prompt: PromptInput, cache_salt: str | None) -> Prompt:
    (tokenized,) = await context.prompts.completion(prompt, add_special_tokens=True)
    return Prompt(tokenized.token_ids, cache_salt or "")


def _json(value: object) -> Response:
    return Response(orjson.dumps(value, default=dict), media_type="application/json")
