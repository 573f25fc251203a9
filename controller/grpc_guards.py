"""Owns what stands in front of the controller's gRPC methods: the API key check, and errors turned into statuses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias, TypeVar, cast

import grpc

from pdserve.errors import InternalError, InvalidApiKey, PdserveError
from service_kit.api_keys import ApiKeys
from service_kit.logs import get_logger

KEYED_SERVICE = "/pdserve.v1.InferenceService/"
REASON_KEY = "pdserve-reason"
PARAM_KEY = "pdserve-param"
RETRY_AFTER_KEY = "retry-after-ms"

Request = TypeVar("Request")
Response = TypeVar("Response")
Context: TypeAlias = "grpc.aio.ServicerContext[Request, Response]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Request, Response]"
UnaryCall: TypeAlias = "Callable[[Request, Context[Request, Response]], Awaitable[Response]]"
StreamCall: TypeAlias = "Callable[[Request, Context[Request, Response]], AsyncIterator[Response]]"

log = get_logger(__name__)


class Guards(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """For unary-unary and unary-stream methods; others pass through."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler[Request, Response]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler[Request, Response]:
        handler = await continuation(handler_call_details)
        keys = self._keys if handler_call_details.method.startswith(KEYED_SERVICE) else ApiKeys()
        if handler is None:
            return handler
        if handler.unary_unary is not None:
            return _guarded_unary(handler, keys)
        return _guarded_stream(handler, keys) if handler.unary_stream is not None else handler


def _guarded_unary(handler: Handler[Request, Response], keys: ApiKeys) -> Handler[Request, Response]:
    inner = cast("UnaryCall[Request, Response]", handler.unary_unary)

    async def call(request: Request, context: Context[Request, Response]) -> Response:
        try:
            _check_key(keys, context)
            return await inner(request, context)
        except Exception as error:
            await _abort(context, error)
            raise

    return cast(
        "Handler[Request, Response]",
        grpc.unary_unary_rpc_method_handler(
            call,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        ),
    )


def _guarded_stream(handler: Handler[Request, Response], keys: ApiKeys) -> Handler[Request, Response]:
    inner = cast("StreamCall[Request, Response]", handler.unary_stream)

    async def call(request: Request, context: Context[Request, Response]) -> AsyncIterator[Response]:
        try:
            _check_key(keys, context)
            async for response in inner(request, context):
                yield response
        except Exception as error:
            await _abort(context, error)
            raise

    return cast(
        "Handler[Request, Response]",
        grpc.unary_stream_rpc_method_handler(
            call,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        ),
    )


def _check_key(keys: ApiKeys, context: Context[Request, Response]) -> None:
    if not keys:
        return
    metadata = context.invocation_metadata() or ()
    presented = next((str(value) for name, value in metadata if name == "authorization"), None)
    if not keys.accepts(presented):
        raise InvalidApiKey("The API key is missing or wrong. Send it as metadata `authorization: Bearer KEY`.")


async def _abort(context: Context[Request, Response], error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError | grpc.aio.BaseError):
        return
    if not isinstance(error, PdserveError):
        log.exception("rpc_failed", error)
        error = InternalError("The controller failed on this call; its log has the cause.")
    metadata = [(REASON_KEY, error.reason)]
    if error.param is not None:
        metadata.append((PARAM_KEY, error.param))
    if error.retry_after_s is not None:
        metadata.append((RETRY_AFTER_KEY, str(round(error.retry_after_s * 1000))))
    await context.abort(error.grpc_status, error.message, tuple(metadata))
