"""Owns the one error tree: class, reason, gRPC status, HTTP status, retryable.

Every process raises these classes; the interceptors of `service_kit.grpc_errors` and the HTTP handlers map them both ways.
`reason` is the machine-readable name that travels (HTTP `code`, gRPC trailing metadata `pdserve-reason`).
"""

from __future__ import annotations

from typing import ClassVar

import grpc


class PdserveError(Exception):
    """Base of every error that a client may see. `str(error)` says what, why and what to do."""

    reason: ClassVar[str] = "internal_error"
    grpc_status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http_status: ClassVar[int] = 500
    http_type: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InternalError(PdserveError):
    """A bug of ours. Clients get the request id, never a traceback."""


class InvalidRequest(PdserveError):
    reason = "invalid_request_error"
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 400
    http_type = "invalid_request_error"


class PromptTooLong(InvalidRequest):
    """The prompt, or prompt + max_tokens, exceeds the context of the model."""

    reason = "context_length_exceeded"

    @classmethod
    def of(cls, tokens: int, limit: int, *, param: str = "prompt") -> PromptTooLong:
        return cls(
            f"This model's context is {limit} tokens, but the request needs {tokens}. "
            "Shorten the prompt or lower max_tokens.",
            param=param,
        )


class RequestTooLarge(PdserveError):
    reason = "request_too_large"
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 413
    http_type = "invalid_request_error"


class InvalidApiKey(PdserveError):
    reason = "invalid_api_key"
    grpc_status = grpc.StatusCode.UNAUTHENTICATED
    http_status = 401
    http_type = "authentication_error"


class PermissionRefused(PdserveError):
    reason = "permission_error"
    grpc_status = grpc.StatusCode.PERMISSION_DENIED
    http_status = 403
    http_type = "permission_error"


class NotFound(PdserveError):
    reason = "not_found"
    grpc_status = grpc.StatusCode.NOT_FOUND
    http_status = 404
    http_type = "invalid_request_error"


class ModelNotFound(NotFound):
    reason = "model_not_found"


class Overloaded(PdserveError):
    """The queue is full. Come back after `retry_after_s`."""

    reason = "overloaded"
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429
    http_type = "rate_limit_error"
    retryable = True


class Unavailable(PdserveError):
    reason = "unavailable"
    grpc_status = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    http_type = "server_error"
    retryable = True


class NoPrefillWorkers(Unavailable):
    reason = "no_prefill_workers"


class NoDecodeWorkers(Unavailable):
    reason = "no_decode_workers"


class WorkerLost(Unavailable):
    """A worker died or stopped answering; the controller re-dispatches."""

    reason = "worker_lost"


class NoCapacity(Unavailable):
    """A worker refuses work now (no blocks, draining, role not held); another candidate may take it."""

    reason = "no_capacity"


class DeadlineExceeded(PdserveError):
    reason = "timeout"
    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = 504
    http_type = "server_error"
    retryable = True


class LayoutMismatch(PdserveError):
    """Two workers cannot exchange KV: identity or representation differ. The pair is refused."""

    reason = "layout_mismatch"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION


class TransferFailed(PdserveError):
    """KV did not arrive whole: connection, length, checksum or lease."""

    reason = "transfer_failed"
    grpc_status = grpc.StatusCode.ABORTED
    http_status = 503
    retryable = True


class KvCorrupt(TransferFailed):
    """A checksum or length did not match; nothing of it was used."""

    reason = "kv_corrupt"


class LeaseExpired(TransferFailed):
    reason = "lease_expired"


class RequestQuarantined(PdserveError):
    """Two workers died while they computed this prompt, and no other prompt was at both deaths: it is not tried a third time."""

    reason = "request_quarantined"


class Cancelled(PdserveError):
    reason = "cancelled"
    grpc_status = grpc.StatusCode.CANCELLED
    http_status = 499
    http_type = "invalid_request_error"


class ModelUnsupported(PdserveError):
    """The checkpoint cannot be served exactly, so it is not served at all."""

    reason = "model_unsupported"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 400
    http_type = "invalid_request_error"


class ConfigInvalid(PdserveError):
    """Configuration refused at start: path and reason in the message."""

    reason = "config_invalid"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION


def _tree(cls: type[PdserveError]) -> list[type[PdserveError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in _tree(child))]


ERRORS_BY_REASON: dict[str, type[PdserveError]] = {cls.reason: cls for cls in _tree(PdserveError)}
ERRORS_BY_REASON["internal_error"] = InternalError


def error_from_reason(reason: str, message: str) -> PdserveError:
    """The error that `reason` names; an unknown reason becomes `InternalError` and keeps its name in the text."""
    cls = ERRORS_BY_REASON.get(reason)
    return cls(message) if cls is not None else InternalError(f"{reason}: {message}")
