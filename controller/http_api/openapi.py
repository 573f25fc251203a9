"""Owns the OpenAPI document: bodies, answers and every status that a path can give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from controller.http_api.answers import ErrorAnswer
from controller.http_api.bodies import ChatBody, CompletionBody, DetokenizeBody, RolesBody, TokenizeBody
from controller.http_api.kv_bodies import BlendVerdictBody, KvExplainBody, KvFlushBody, KvPinBody, KvVerifyBody

Json: TypeAlias = dict[str, object]
Responses: TypeAlias = dict[int | str, dict[str, object]]

_BODIES: tuple[type[BaseModel], ...] = (
    CompletionBody,
    ChatBody,
    TokenizeBody,
    DetokenizeBody,
    RolesBody,
    KvExplainBody,
    KvPinBody,
    KvFlushBody,
    KvVerifyBody,
    BlendVerdictBody,
)
_REF = "#/components/schemas/{model}"
_MEANINGS = {
    400: "A field or the JSON is wrong, or the prompt is too long.",
    401: "No valid API key.",
    403: "Not allowed with this key.",
    404: "No such model, worker, request or path.",
    413: "The body is too large.",
    429: "The queue is full: try again after Retry-After.",
    499: "The request was cancelled.",
    500: "A bug: report the request id.",
    503: "No worker can serve this now: try again after Retry-After.",
    504: "The deadline passed.",
}
KEYED = (401, 403)
WITH_BODY = (400, 413, 504)


def error_answers(*statuses: int) -> Responses:
    return {
        status: {"model": ErrorAnswer, "description": _MEANINGS[status], "headers": _headers(status)}
        for status in sorted({*statuses, 500})
    }


def _headers(status: int) -> Json:
    if status not in (429, 503):
        return {}
    whole_number: Json = {"schema": {"type": "integer", "minimum": 1}}
    return {"Retry-After": whole_number, "retry-after-ms": whole_number}


def json_body(shape: type[BaseModel]) -> dict[str, Json]:
    """`openapi_extra` of a route that reads its body itself."""
    schema = {"$ref": _REF.format(model=shape.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def streamed_too(shape: type[BaseModel]) -> Responses:
    """The answer of a generating route: one object, or events with `stream: true`."""
    events: Json = {"schema": {"type": "string", "description": "data: {chunk} events, then data: [DONE]."}}
    return {200: {"model": shape, "content": {"text/event-stream": events}, "description": "The answer."}}


def install_openapi(app: FastAPI, *, keyed: bool) -> None:
    def document() -> Mapping[str, object]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, keyed=keyed)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign,assignment]  # FastAPI's own way to extend it


def _document(app: FastAPI, *, keyed: bool) -> dict[str, object]:
    schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, definitions = models_json_schema([(shape, "validation") for shape in _BODIES], ref_template=_REF)
    components = schema.setdefault("components", {})
    components.setdefault("schemas", {}).update(definitions["$defs"])
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which we never send
        components["schemas"].pop(name, None)
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    if keyed:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
    return schema
