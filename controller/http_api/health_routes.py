"""Owns /health, /livez, /readyz, /version and /metrics: open to everyone who reaches the port."""

from __future__ import annotations

import orjson
from fastapi import APIRouter, Response

from controller.http_api.answers import HealthAnswer, VersionAnswer
from controller.http_api.context import ApiContext
from controller.http_api.openapi import error_answers
from pdserve.errors import Unavailable
from service_kit.metrics import CONTENT_TYPE

_OK = orjson.dumps({"status": "ok"})


def health_router(context: ApiContext) -> APIRouter:
    router = APIRouter(tags=["health"])

    def ready() -> Response:
        status = context.operations.status()
        if status.ready():
            return Response(_OK, media_type="application/json")
        why = "The controller drains." if status.draining else "No worker is ready."
        raise Unavailable(f"{why} Try again in a moment; `pdserve status` shows the workers.")

    @router.get("/livez", responses={200: {"model": HealthAnswer}, **error_answers()})
    async def livez() -> Response:
        """The process runs. For liveness probes: says nothing about workers."""
        return Response(_OK, media_type="application/json")

    @router.get("/readyz", responses={200: {"model": HealthAnswer}, **error_answers(503)})
    async def readyz() -> Response:
        """A request could be served now."""
        return ready()

    @router.get("/health", responses={200: {"model": HealthAnswer}, **error_answers(503)})
    async def health() -> Response:
        """As /readyz, under the name that other servers use."""
        return ready()

    @router.get("/version", responses={200: {"model": VersionAnswer}, **error_answers()})
    async def version() -> Response:
        return Response(orjson.dumps({"version": context.operations.status().version}), media_type="application/json")

    @router.get(
        "/metrics",
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **error_answers()},
        response_class=Response,
    )
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(context.metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    return router
