"""Owns the composition of the HTTP API: routes, guards, OpenAPI. Serve it with uvicorn."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp

from controller.http_api.blend_routes import blend_router
from controller.http_api.context import ApiContext
from controller.http_api.errors import install_error_handlers
from controller.http_api.guards import BodyLimit, KeyCheck, RequestIds
from controller.http_api.health_routes import health_router
from controller.http_api.inference_routes import inference_router
from controller.http_api.kv_routes import kv_router
from controller.http_api.model_routes import model_router
from controller.http_api.openapi import install_openapi
from controller.http_api.operator_routes import operator_router
from controller.http_api.prompts import PromptTokenizer
from controller.http_api.sampling import Limits
from controller.operations import ModelInfo, Operations
from controller.request import Generator
from service_kit.api_keys import ApiKeys
from service_kit.config import ControllerConfig
from service_kit.metrics import Metrics


def create_app(
    generator: Generator,
    operations: Operations,
    model: ModelInfo,
    config: ControllerConfig,
    metrics: Metrics,
    api_keys: ApiKeys,
) -> ASGIApp:
    """The whole HTTP API as one ASGI app. Its lifespan closes the tokenizer's threads."""
    prompts = PromptTokenizer(model, config.tokenizer_threads)
    context = ApiContext(
        generator=generator,
        operations=operations,
        model=model,
        metrics=metrics,
        prompts=prompts,
        limits=Limits(model.max_context_tokens, model.tokenizer.vocab_size, config.max_choices),
        keepalive_s=config.sse_keepalive_s,
        mint_seed=lambda: secrets.randbits(63),
        unix_now=time.time,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        prompts.close()

    app = FastAPI(
        title="pdserve",
        version=operations.status().version,
        description="OpenAI-compatible inference on a disaggregated cluster.",
        lifespan=lifespan,
        docs_url=None,  # their scripts come from a CDN
        redoc_url=None,
        redirect_slashes=False,
    )
    install_error_handlers(app)
    for router in (inference_router, model_router, health_router, operator_router, kv_router, blend_router):
        app.include_router(router(context))
    install_openapi(app, keyed=bool(api_keys))
    return RequestIds(KeyCheck(BodyLimit(app, config.max_body_bytes), api_keys))
