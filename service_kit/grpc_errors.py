"""Owns errors at the gRPC border of a server: what a servicer raises becomes a status with the reason in trailing metadata.

The way back, on the caller's side, is `pdserve.rpc_errors.error_from_rpc`, given here too.
"""

from __future__ import annotations

import inspect
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeAlias, cast

import grpc

from pdserve.errors import InternalError, PdserveError
from pdserve.rpc_errors import PARAM_KEY, REASON_KEY, RETRY_AFTER_KEY, error_from_rpc, is_connection_loss
from service_kit.grpc_handlers import Context, Continuation, Handler, Request, Response, with_behaviour
from service_kit.logs import get_logger

__all__ = ["ErrorStatuses", "error_from_rpc", "is_connection_loss", "status_metadata"]

MAX_DETAILS_CHARS = 2000  # a header block holds 8 KB, percent-encoded

# One request, or an iterator of them: the interceptor hands it on as it is.
Unary: TypeAlias = "Callable[[Request, Context[Request, Response]], Awaitable[Response]]"
Stream: TypeAlias = "Callable[[Request, Context[Request, Response]], AsyncGenerator[Response, None]]"

log = get_logger(__name__)


class ErrorStatuses(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """For all four kinds of methods. A PdserveError ends the call with its status and reason; any other exception with INTERNAL
    and an id under which the traceback is logged. Cancellation and `context.abort` pass through."""

    async def intercept_service(
        self, continuation: Continuation[Request, Response], handler_call_details: grpc.HandlerCallDetails
    ) -> Handler[Request, Response]:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        return _guarded(handler, handler_call_details.method)


def status_metadata(error: PdserveError) -> tuple[tuple[str, str], ...]:
    """Trailing metadata that `error_from_rpc` reads."""
    metadata = [(REASON_KEY, error.reason)]
    if error.param is not None and error.param.isascii() and error.param.isprintable():
        metadata.append((PARAM_KEY, error.param[:200]))
    if error.retry_after_s is not None:
        metadata.append((RETRY_AFTER_KEY, str(round(error.retry_after_s * 1000))))
    return tuple(metadata)


def _guarded(handler: Handler[Request, Response], method: str) -> Handler[Request, Response]:
    inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    # A streaming servicer is an asynchronous generator, or a coroutine that calls context.write.
    if handler.response_streaming and inspect.isasyncgenfunction(inner):
        behaviour = cast("Callable[..., object]", _guarded_stream(cast("Stream[Request, Response]", inner), method))
    else:
        behaviour = _guarded_unary(cast("Unary[Request, Response]", inner), method)
    return with_behaviour(handler, behaviour)


def _guarded_unary(inner: Unary[Request, Response], method: str) -> Unary[Request, Response]:
    async def call(request: Request, context: Context[Request, Response]) -> Response:
        try:
            return await inner(request, context)
        except Exception as error:
            await _abort(context, error, method)
            raise

    return call


def _guarded_stream(
    inner: Stream[Request, Response], method: str
) -> Callable[[Request, Context[Request, Response]], AsyncIterator[Response]]:
    async def call(request: Request, context: Context[Request, Response]) -> AsyncIterator[Response]:
        try:
            async with aclosing(inner(request, context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:
            await _abort(context, error, method)
            raise

    return call


async def _abort(context: Context[Request, Response], error: Exception, method: str) -> None:
    """Ends the call. Returns only where it has been ended already."""
    if isinstance(error, grpc.aio.AbortError | grpc.aio.BaseError):
        return
    if not isinstance(error, PdserveError):
        error_id = secrets.token_hex(6)
        log.exception("rpc_failed", error, method=method, error_id=error_id)
        error = InternalError(f"This call failed inside the server; its log has the cause under {error_id}.")
    await context.abort(error.grpc_status, error.message[:MAX_DETAILS_CHARS], status_metadata(error))
