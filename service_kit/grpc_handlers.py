"""Owns gRPC method handlers of all four kinds as interceptors see them: their types, and another behaviour in place of theirs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias, TypeVar

import grpc

Request = TypeVar("Request")
Response = TypeVar("Response")
Context: TypeAlias = "grpc.aio.ServicerContext[Request, Response]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Request, Response]"
# Gives None where nobody serves that method, whatever the stubs of grpc say: hand it on, grpc answers UNIMPLEMENTED.
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler[Request, Response]]]"


def with_behaviour(handler: Handler[Request, Response], behaviour: Callable[..., object]) -> Handler[Request, Response]:
    """A handler of the same kind and messages that runs `behaviour`."""
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(
        behaviour,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
