"""Owns turning a failed gRPC call back into the typed error that the server raised. Sync and asyncio calls alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import grpc

from pdserve.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidApiKey,
    InvalidRequest,
    NotFound,
    Overloaded,
    PdserveError,
    PermissionRefused,
    RequestTooLarge,
    Unavailable,
    error_from_reason,
)

REASON_KEY = "pdserve-reason"
PARAM_KEY = "pdserve-param"
RETRY_AFTER_KEY = "retry-after-ms"

# For calls that never reached a servicer of ours, so that no reason came back.
_BY_STATUS: dict[grpc.StatusCode, type[PdserveError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNAUTHENTICATED: InvalidApiKey,
    grpc.StatusCode.PERMISSION_DENIED: PermissionRefused,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.RESOURCE_EXHAUSTED: RequestTooLarge,
}
_TLS_WORDS = ("handshake", "ssl", "certificate", "tls", "wrong_version_number")
_TOO_LARGE_WORDS = ("larger than max", "message length")


def error_from_rpc(error: grpc.RpcError) -> PdserveError:
    """The error that the server raised, by the reason in its trailing metadata; else by the status."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    code, details = error.code(), error.details() or ""
    metadata = dict(_metadata(error))
    reason = metadata.get(REASON_KEY)
    if reason is not None:
        typed = error_from_reason(reason, details)
        typed.param = metadata.get(PARAM_KEY)
        typed.retry_after_s = _seconds(metadata.get(RETRY_AFTER_KEY))
        return typed
    return _untold(code, details)


def is_connection_loss(error: grpc.RpcError) -> bool:
    """True where the call ended because the connection or the server went away, so that it may be taken up again."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    if any(key == REASON_KEY for key, _ in _metadata(error)):
        return False
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        return not is_tls_refusal(details)
    # A server that stops cancels the streams it does not wait for; a reset stream is INTERNAL or UNKNOWN.
    reset = "RST_STREAM" in details or "Stream removed" in details
    return code is grpc.StatusCode.CANCELLED or (code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN) and reset)


def is_tls_refusal(details: str) -> bool:
    """gRPC reports a refused handshake as UNAVAILABLE; retrying does not help."""
    lowered = details.lower()
    return any(word in lowered for word in _TLS_WORDS)


def _untold(code: grpc.StatusCode, details: str) -> PdserveError:
    if code is grpc.StatusCode.UNAVAILABLE and is_tls_refusal(details):
        return PermissionRefused(
            f"TLS was refused: {details}. Check the CA and, where the server asks for one, the client certificate."
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not any(word in details.lower() for word in _TOO_LARGE_WORDS):
        return Overloaded(details)
    cls = _BY_STATUS.get(code)
    return cls(details or code.name) if cls is not None else InternalError(f"{code.name}: {details}")


def _metadata(error: grpc.Call | grpc.aio.AioRpcError) -> list[tuple[str, str]]:
    found = cast("Iterable[tuple[str, str | bytes]] | None", error.trailing_metadata())  # the stubs have no type for it
    return [(key, str(value)) for key, value in found or ()]


def _seconds(milliseconds: str | None) -> float | None:
    return int(milliseconds) / 1000 if milliseconds is not None and milliseconds.isdigit() else None
