"""Owns /api/v1/kv/blend: what a check of blended KV (`pdserve verify --blend`) asks leave for, and its verdict."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from controller.blend_gate import BlendTrial
from controller.blend_verdicts import BlendFigures, BlendFindings, BlendVerdict
from controller.http_api.context import ApiContext
from controller.http_api.json_body import read_body
from controller.http_api.kv_bodies import BlendFiguresBody, BlendVerdictBody
from controller.http_api.openapi import KEYED, WITH_BODY, error_answers, json_body


def blend_router(context: ApiContext) -> APIRouter:
    router = APIRouter(prefix="/api/v1/kv/blend", tags=["operators"])
    blends = context.operations.blends

    @router.post("/trials", responses={200: {"model": BlendTrial}, **error_answers(*KEYED, 400, 413, 503)})
    async def begin_trial() -> Response:
        """Lets a check ask for blends before there is a verdict: with this `cache_salt`, until 15 idle minutes have passed."""
        return _json(blends.begin_trial())

    @router.post(
        "/verdicts",
        responses={200: {"model": BlendVerdict}, **error_answers(*WITH_BODY, *KEYED, 503)},
        openapi_extra=json_body(BlendVerdictBody),
    )
    async def conclude(request: Request) -> Response:
        """Ends a trial: what it found counts in the place of an earlier verdict on this model and method."""
        body = await read_body(request, BlendVerdictBody)
        return _json(blends.conclude(body.trial, _findings(body)))

    return router


def _findings(body: BlendVerdictBody) -> BlendFindings:
    return BlendFindings(
        body.method,
        body.ratio,
        body.first_tokens,
        body.blended_prompts,
        _figures(body.figures),
        _figures(body.allowed),
        tuple(body.failures),
    )


def _figures(body: BlendFiguresBody) -> BlendFigures:
    return BlendFigures(body.mean_kl_nats, body.max_kl_nats, body.top1_agreement)


def _json(value: BlendTrial | BlendVerdict) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
