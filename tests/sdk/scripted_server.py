"""Owns an InferenceService twin: counts upwards as tokens, and breaks where the script says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc

from pdserve.errors import PdserveError
from pdserve.v1 import inference_pb2, inference_pb2_grpc, types_pb2

STOP_S = 60.0


@dataclass
class Script:
    """What the server does; the same for all calls but the breaks, which are used up one per call."""

    tokens: int = 10
    breaks: list[int] = field(
        default_factory=list
    )  # after so many tokens of a call: UNAVAILABLE, as by a lost connection
    short: bool = False  # ends the stream early, without an error
    error: PdserveError | None = None
    hold: threading.Event | None = None  # waited for after the first token


class ScriptedServer(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, script: Script, port: int = 0, credentials: grpc.ServerCredentials | None = None) -> None:
        self.script = script
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.keys: list[str] = []
        self.remaining_s: list[float | None] = []
        self.cancelled: list[str] = []
        self._server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        address = f"127.0.0.1:{port}"
        if credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, credentials)
        self.address = f"127.0.0.1:{self.port}"
        self._server.start()

    def stop(self) -> None:
        assert self._server.stop(0).wait(STOP_S), "a call does not end"

    def Generate(  # noqa: N802 (the name is gRPC's)
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        script = self.script
        self.requests.append(request)
        self.remaining_s.append(context.time_remaining())
        self.keys += [str(value) for key, value in context.invocation_metadata() if key == "authorization"]
        if script.error is not None:
            self._abort(context, script.error)
        yield inference_pb2.GenerateResponse(request_id=request.request_id)
        left = script.breaks.pop(0) if script.breaks else None
        begin = list(request.next_index) or [0] * request.n
        for index in range(min(begin), script.tokens):
            for choice in range(request.n):
                if index < begin[choice]:
                    continue
                if left == 0:
                    if script.short:
                        return
                    context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
                yield self._response(request, choice, index)
                left = None if left is None else left - 1
            if script.hold is not None:
                script.hold.wait(20)

    def _response(
        self, request: inference_pb2.GenerateRequest, choice: int, index: int
    ) -> inference_pb2.GenerateResponse:
        last = index == self.script.tokens - 1
        delta = inference_pb2.ChoiceDelta(
            choice=choice, index=index, token_ids=[100 * choice + index], text=f"<{choice}.{index}>",
            finish_reason=types_pb2.FINISH_REASON_LENGTH if last else types_pb2.FINISH_REASON_UNSPECIFIED,
        )  # fmt: skip
        response = inference_pb2.GenerateResponse(request_id=request.request_id, choices=[delta])
        if last and choice == request.n - 1:
            response.usage.prompt_tokens, response.usage.completion_tokens = 3, self.script.tokens * request.n
        return response

    def _abort(self, context: grpc.ServicerContext, error: PdserveError) -> None:
        metadata = [("pdserve-reason", error.reason)]
        metadata += [("pdserve-param", error.param)] if error.param else []
        metadata += [("retry-after-ms", str(int(error.retry_after_s * 1000)))] if error.retry_after_s else []
        context.set_trailing_metadata(tuple(metadata))
        context.abort(error.grpc_status, error.message)

    def Cancel(  # noqa: N802 (the name is gRPC's)
        self, request: inference_pb2.CancelRequest, context: grpc.ServicerContext
    ) -> inference_pb2.CancelResponse:
        self.cancelled.append(request.request_id)
        return inference_pb2.CancelResponse(found=request.request_id in {one.request_id for one in self.requests})


ServerMaker = Callable[..., ScriptedServer]


def expected(n: int, tokens: int) -> Sequence[tuple[int, ...]]:
    return [tuple(100 * choice + index for index in range(tokens)) for choice in range(n)]
