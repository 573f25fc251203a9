"""Owns how a body becomes a typed one: content type, bounded read, JSON, validation; every fault a 400 that names the field."""

from __future__ import annotations

import asyncio
import re
from typing import TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError

from controller.http_api.refused_fields import check_refused, unknown_fields
from pdserve.errors import DeadlineExceeded, InvalidRequest
from service_kit.logs import get_logger

BODY_TIMEOUT_S = 60.0
_JSON_TYPE = re.compile(r"application/(?:json|[\w.+-]+\+json)\s*(?:;.*)?", re.IGNORECASE)
_log = get_logger(__name__)

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, shape: type[Body]) -> Body:
    """Raises InvalidRequest; RequestTooLarge comes from `guards.BodyLimit` underneath."""
    if not _JSON_TYPE.fullmatch(request.headers.get("content-type", "")):
        raise InvalidRequest("The body must be JSON: send the header `Content-Type: application/json`.")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            data = await request.body()
    except TimeoutError as error:
        raise DeadlineExceeded(f"The body did not arrive within {BODY_TIMEOUT_S:.0f} s. Send it again.") from error
    body = parse_body(data, shape)
    if body.model_extra and (unknown := unknown_fields(body.model_extra)):
        _log.info("unknown_fields_ignored", path=request.url.path, fields=[name[:64] for name in unknown[:16]])
    return body


def parse_body(data: bytes, shape: type[Body]) -> Body:
    """orjson refuses NaN, Infinity, invalid UTF-8, lone surrogates and nesting deeper than 1,024 by itself."""
    try:
        parsed: object = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from error
    if not isinstance(parsed, dict):
        raise InvalidRequest('The body must be a JSON object, for example {"prompt": "Hello"}.')
    try:
        body = shape.model_validate(parsed, strict=True)
    except ValidationError as error:
        raise _refusal(error) from error
    check_refused(body.model_extra or {})
    return body


def _refusal(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = _path(first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    more = error.error_count() - 1
    also = f" ({more} more field{'s are' if more > 1 else ' is'} wrong.)" if more else ""
    return InvalidRequest(f"{param or 'The body'}: {reason}.{also}".replace("..", "."), param=param or None)


def _path(loc: tuple[int | str, ...]) -> str:
    """("messages", 0, "content") -> messages[0].content; long names of the client's own are cut."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f"{'.' if path else ''}{part[:64]}"
    return path[:256]
