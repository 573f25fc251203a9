"""Owns the error envelope: every failure of the HTTP API as `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
from typing import TypedDict

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from controller.http_api.advice import advice_for
from pdserve.errors import InternalError, InvalidRequest, PdserveError, RequestQuarantined
from service_kit.logs import get_logger

DEFAULT_RETRY_AFTER_S = 1.0
_log = get_logger(__name__)


class ErrorFields(TypedDict):
    message: str
    type: str
    param: str | None
    code: str


class ErrorEnvelope(TypedDict):
    error: ErrorFields


def request_id_of(request: Request) -> str:
    """Set by `guards.RequestIds` before anything else runs."""
    return str(request.scope["state"]["request_id"])


def envelope(error: PdserveError, request_id: str) -> ErrorEnvelope:
    """Of a bug only the request id is told; its cause is in the log."""
    message, code = error.message, error.reason
    if error.http_status == 500 and not isinstance(error, RequestQuarantined):
        message = (
            f"Internal error. Report it with the request id {request_id}, under which the server's log has the cause."
        )
        code = InternalError.reason
    return {"error": {"message": message, "type": error.http_type, "param": error.param, "code": code}}


def error_response(error: PdserveError, request_id: str) -> Response:
    headers: dict[str, str] = {}
    if error.http_status in (429, 503):
        after_s = error.retry_after_s if error.retry_after_s is not None else DEFAULT_RETRY_AFTER_S
        headers = {"retry-after": str(max(1, math.ceil(after_s))), "retry-after-ms": str(max(1, round(after_s * 1000)))}
    elif error.http_status == 401:
        headers = {"www-authenticate": "Bearer"}
    body = orjson.dumps(envelope(error, request_id))
    return Response(body, error.http_status, headers, media_type="application/json")


def _on_pdserve_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PdserveError)
    request_id = request_id_of(request)
    if error.http_status == 500:
        _log.exception("request_failed", error, request_id=request_id, path=request.url.path)
    return error_response(error, request_id)


def _on_http_exception(request: Request, error: Exception) -> Response:
    """What Starlette's router raises: 404 and 405."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message, code = (
            f"{request.method} is not allowed on {path}. Use {allowed or 'another method'}.",
            "method_not_allowed",
        )
    else:
        message, code = advice_for(path), "not_found"
    fields = ErrorFields(message=message, type="invalid_request_error", param=None, code=code)
    body = orjson.dumps({"error": fields})
    return Response(body, error.status_code, error.headers, media_type="application/json")


def _on_validation_error(request: Request, error: Exception) -> Response:
    """Query and path parameters; bodies are validated in `json_body`."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = [str(part) for part in first["loc"][1:]]
    param = ".".join(where) or None
    refused = InvalidRequest(f"{param or 'The request'}: {first['msg']}.", param=param)
    return error_response(refused, request_id_of(request))


def _on_bug(request: Request, error: Exception) -> Response:
    """Starlette raises the error again after this answer, and `guards.RequestIds` logs it."""
    return error_response(InternalError(str(error)), request_id_of(request))


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(Exception, _on_bug)
    app.add_exception_handler(PdserveError, _on_pdserve_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
