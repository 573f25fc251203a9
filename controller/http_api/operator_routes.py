"""Owns /api/v1: what operators, the CLI and the dashboard see and do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import orjson
from fastapi import APIRouter, Query, Request, Response

from controller.http_api.bodies import RolesBody
from controller.http_api.context import ApiContext
from controller.http_api.json_body import read_body
from controller.http_api.openapi import KEYED, WITH_BODY, error_answers, json_body
from controller.operations import ClusterStatus, RequestSummary, RequestTimeline, WorkerStatus
from pdserve.errors import NotFound

MAX_LISTED = 1000


def operator_router(context: ApiContext) -> APIRouter:
    router = APIRouter(prefix="/api/v1", tags=["operators"])
    operations = context.operations

    @router.get("/status", responses={200: {"model": ClusterStatus}, **error_answers(*KEYED)})
    async def status() -> Response:
        """The cluster and its workers."""
        return _json(operations.status())

    @router.get("/requests", responses={200: {"model": list[RequestSummary]}, **error_answers(*KEYED, 400)})
    async def requests(limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 100) -> Response:
        """Live and recent requests, newest first."""
        return _json(operations.requests(limit))

    @router.get("/requests/{request_id}", responses={200: {"model": RequestTimeline}, **error_answers(*KEYED, 404)})
    async def request(request_id: str) -> Response:
        """Timeline and routing decisions of one request."""
        timeline = operations.request(request_id)
        if timeline is None:
            raise NotFound(f"No request {request_id[:128]!r} is kept. `GET /api/v1/requests` lists those that are.")
        return _json(timeline)

    @router.post(
        "/workers/{worker_id}/roles",
        responses={200: {"model": WorkerStatus}, **error_answers(*WITH_BODY, *KEYED, 404, 503)},
        openapi_extra=json_body(RolesBody),
    )
    async def set_roles(worker_id: str, request: Request) -> Response:
        """Changes the roles of a worker without restarting it."""
        body = await read_body(request, RolesBody)
        return _json(await operations.set_roles(worker_id, tuple(dict.fromkeys(body.roles))))

    @router.post(
        "/workers/{worker_id}/drain",
        responses={200: {"model": WorkerStatus}, **error_answers(*KEYED, 400, 404, 413, 503, 504)},
    )
    async def drain(worker_id: str) -> Response:
        """Gives a worker no new work; it ends when its running requests have."""
        return _json(await operations.drain(worker_id))

    return router


def _json(value: object) -> Response:
    return Response(orjson.dumps(value, default=_plain_mapping), media_type="application/json")


def _plain_mapping(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
