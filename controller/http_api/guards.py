"""Owns what stands before the routes, as plain ASGI: request ids, API keys, the body limit, the last catch of a bug."""

from __future__ import annotations

import asyncio
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controller.http_api.errors import error_response
from controller.http_api.request_ids import LiveIds
from pdserve.errors import InternalError, InvalidApiKey, RequestTooLarge
from service_kit.api_keys import ApiKeys
from service_kit.logs import get_logger

OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/version", "/metrics"})
DRAIN_TIMEOUT_S = 5.0
DRAIN_FACTOR = 8  # times the limit: what of a refused body is read away, so that the client gets to read the answer

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_log = get_logger(__name__)


class RequestIds:
    """Outermost. Gives each request its id, and answers 500 for whatever nobody else answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._live = LiveIds()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        presented = Headers(scope=scope).get("x-request-id", "")
        request_id = presented if _REQUEST_ID.fullmatch(presented) else secrets.token_hex(16)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            with self._live.hold(request_id) as run_id:
                scope["state"] = {**scope.get("state", {}), "request_id": request_id, "run_id": run_id}
                await self._app(scope, receive, send_with_id)
        except Exception as error:  # the root of this request's task
            _log.exception("request_failed", error, request_id=request_id, path=scope["path"])
            if not started:
                await error_response(InternalError(str(error)), request_id)(scope, receive, send_with_id)


class KeyCheck:
    """Answers 401 before anything of the body is read."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or scope["path"] in OPEN_PATHS
            or self._keys.accepts(Headers(scope=scope).get("authorization"))
        ):
            await self._app(scope, receive, send)
        else:
            refused = InvalidApiKey("No valid API key. Send the header `Authorization: Bearer KEY`.")
            await error_response(refused, scope["state"]["request_id"])(scope, receive, send)


class BodyLimit:
    """Answers 413 by Content-Length, before parsing; a chunked body that grows too large raises it out of `receive`."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._limit = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limit:
            if headers.get("expect", "").lower() != "100-continue":
                await _drain(receive, self._limit * DRAIN_FACTOR)
            await self._refuse(scope, receive, send)
            return
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise self._error()
            return message

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 413:
                await _drain(receive, self._limit * DRAIN_FACTOR)
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self._app(scope, bounded, closing)

    def _error(self) -> RequestTooLarge:
        return RequestTooLarge(f"The body is larger than {self._limit} bytes. Send a smaller one.")

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = error_response(self._error(), scope["state"]["request_id"])
        response.headers["connection"] = "close"
        await response(scope, receive, send)


async def _drain(receive: Receive, room_bytes: int) -> None:
    try:
        async with asyncio.timeout(DRAIN_TIMEOUT_S):
            while room_bytes > 0:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
                room_bytes -= len(message.get("body", b""))
    except TimeoutError:
        return  # a client this slow loses the connection, and with it perhaps the answer
