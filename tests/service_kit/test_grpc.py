"""gRPC servers and channels: errors both ways, keys, TLS, health, reflection, limits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pdserve.errors import (
    ERRORS_BY_REASON,
    ConfigInvalid,
    InternalError,
    InvalidApiKey,
    InvalidRequest,
    Overloaded,
    PdserveError,
    PermissionRefused,
    Unavailable,
)
from pdserve.rpc_errors import error_from_rpc
from pdserve.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from service_kit.api_keys import ApiKeys
from service_kit.grpc_server import (
    GrpcServer,
    ServerLimits,
    build_server,
    channel_credentials,
    open_channel,
    server_credentials,
)
from tests.service_kit.certificates import Certificates, make

INFERENCE = "pdserve.v1.InferenceService"
CALL_S = 10.0
NO_KEYS = ApiKeys()
LIMITS = ServerLimits()


class Failing(inference_pb2_grpc.InferenceServiceServicer, worker_pb2_grpc.WorkerServiceServicer):
    """Raises what it was given: before the first message, or after it where the prompt says "late"."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
        self.ended = asyncio.Event()

    async def Generate(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        try:
            if request.text in ("late", "for ever"):
                yield inference_pb2.GenerateResponse(request_id="first")
            if request.text == "for ever":
                await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
            yield inference_pb2.GenerateResponse(request_id="done")
        finally:
            self.ended.set()

    async def Cancel(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        if request.request_id == "abort":
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "by the servicer itself")
        if self.error is not None:
            raise self.error
        return inference_pb2.CancelResponse(found=True)

    async def Session(self, request_iterator, context):  # type: ignore[no-untyped-def]  # noqa: N802
        async for _ in request_iterator:
            if self.error is not None:
                raise self.error
            yield worker_pb2.SessionResponse(sequence=1)


class Served:
    """One server and one channel to it."""

    def __init__(self, server: GrpcServer, servicer: Failing, channel: grpc.aio.Channel, address: str) -> None:
        self.server, self.servicer, self.channel, self.address = server, servicer, channel, address
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.worker = worker_pb2_grpc.WorkerServiceStub(channel)

    async def generate(self, text: str = "a", key: str | None = None) -> list[str]:
        metadata = (("authorization", f"Bearer {key}"),) if key else ()
        call = self.inference.Generate(inference_pb2.GenerateRequest(text=text), timeout=CALL_S, metadata=metadata)
        return [response.request_id async for response in call]


Serve = Callable[..., "asyncio.Future[Served]"]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    served: list[Served] = []

    async def _serve(
        error: BaseException | None = None,
        keys: ApiKeys = NO_KEYS,
        limits: ServerLimits = LIMITS,
        tls: Certificates | None = None,
    ) -> Served:
        server, servicer = build_server([INFERENCE], keys, limits), Failing(error)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server.server)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server.server)
        security = tls.security() if tls is not None else None
        credentials = server_credentials(security, clients_need_certificates=True) if security is not None else None
        address = server.bind("127.0.0.1", 0, credentials)
        await server.start()
        own = channel_credentials(security) if security is not None else None
        served.append(Served(server, servicer, open_channel(address, own), address))
        return served[-1]

    yield _serve  # type: ignore[misc]
    for one in served:
        await one.channel.close(None)
        await one.server.stop(0)


async def _error(awaited: object) -> PdserveError:
    with pytest.raises(grpc.RpcError) as raised:
        await awaited  # type: ignore[misc]
    return error_from_rpc(raised.value)


@pytest.mark.parametrize("reason", sorted(ERRORS_BY_REASON))
async def test_every_error_of_the_tree_comes_back_as_itself(serve: Serve, reason: str) -> None:
    cls = ERRORS_BY_REASON[reason]
    served = await serve(cls("what, why, what to do: ü"))
    error = await _error(served.generate())
    assert type(error) is cls
    assert error.message == "what, why, what to do: ü"


async def test_unary_and_bidirectional_methods_are_covered_too(serve: Serve) -> None:
    served = await serve(InvalidRequest("wrong", param="n", retry_after_s=0.25))
    unary = await _error(served.inference.Cancel(inference_pb2.CancelRequest(), timeout=CALL_S))
    assert (type(unary), unary.param, unary.retry_after_s) == (InvalidRequest, "n", 0.25)
    session = served.worker.Session(iter([worker_pb2.SessionRequest()]), timeout=CALL_S)
    assert type(await _error(session.read())) is InvalidRequest


async def test_an_error_after_the_first_message_keeps_its_type(serve: Serve) -> None:
    served = await serve(Overloaded("full", retry_after_s=2.0))
    call = served.inference.Generate(inference_pb2.GenerateRequest(text="late"), timeout=CALL_S)
    assert isinstance(await call.read(), inference_pb2.GenerateResponse)
    error = await _error(call.read())
    assert (type(error), error.retry_after_s) == (Overloaded, 2.0)


async def test_a_bug_tells_the_client_an_id_and_the_log_the_traceback(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    served = await serve(ZeroDivisionError("secret detail"))
    with caplog.at_level(logging.ERROR):
        error = await _error(served.generate())
    assert type(error) is InternalError
    assert "secret detail" not in error.message
    record = next(record for record in caplog.records if record.getMessage() == "rpc_failed")
    assert record.exc_info is not None
    assert record.pdserve_fields["error_id"] in error.message  # type: ignore[attr-defined]


async def test_an_abort_of_the_servicer_is_left_as_it_is(serve: Serve) -> None:
    served = await serve()
    with pytest.raises(grpc.RpcError) as raised:
        await served.inference.Cancel(inference_pb2.CancelRequest(request_id="abort"), timeout=CALL_S)
    assert raised.value.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_a_client_that_leaves_ends_the_servicer(serve: Serve) -> None:
    served = await serve()
    call = served.inference.Generate(inference_pb2.GenerateRequest(text="for ever"), timeout=CALL_S)
    assert isinstance(await call.read(), inference_pb2.GenerateResponse)
    call.cancel()
    await asyncio.wait_for(served.servicer.ended.wait(), CALL_S)


async def test_a_long_message_does_not_break_the_header_block(serve: Serve) -> None:
    served = await serve(InvalidRequest("ü" * 100_000, param="x" * 100_000))
    error = await _error(served.generate())
    assert type(error) is InvalidRequest


async def test_a_key_is_asked_for_by_the_inference_service_alone(serve: Serve) -> None:
    served = await serve(keys=ApiKeys((b"the-right-key",)))
    for key in (None, "the-wrong-key"):
        assert type(await _error(served.generate(key=key))) is InvalidApiKey
    assert await served.generate(key="the-right-key") == ["done"]
    assert type(await _error(served.inference.Cancel(inference_pb2.CancelRequest(), timeout=CALL_S))) is InvalidApiKey
    session = served.worker.Session(iter([worker_pb2.SessionRequest()]), timeout=CALL_S)
    assert isinstance(await session.read(), worker_pb2.SessionResponse)


async def test_health_follows_what_the_process_says(serve: Serve) -> None:
    served = await serve()
    health = health_pb2_grpc.HealthStub(served.channel)
    request = health_pb2.HealthCheckRequest(service=INFERENCE)
    assert (await health.Check(request, timeout=CALL_S)).status == health_pb2.HealthCheckResponse.SERVING
    await served.server.serving(False)
    assert (await health.Check(request, timeout=CALL_S)).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_reflection_lists_the_services(serve: Serve) -> None:
    served = await serve()
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    answer = await stub.ServerReflectionInfo(requests, timeout=CALL_S).read()
    assert INFERENCE in {service.name for service in answer.list_services_response.service}


async def test_a_message_over_the_limit_is_refused(serve: Serve) -> None:
    served = await serve(limits=ServerLimits(max_receive_bytes=1000))
    error = await _error(served.generate("x" * 2000))
    assert error.reason == "request_too_large"
    assert await served.generate("x") == ["done"]


async def test_a_taken_port_is_refused_at_start(serve: Serve) -> None:
    served = await serve()
    port = int(served.address.rsplit(":", 1)[1])
    with pytest.raises(ConfigInvalid, match="cannot be bound"):
        build_server([], ApiKeys()).bind("127.0.0.1", port, None)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make(tmp_path_factory.mktemp("tls"))


async def test_mutual_tls_lets_a_certificate_of_the_ca_in(serve: Serve, certificates: Certificates) -> None:
    served = await serve(tls=certificates)
    assert await served.generate() == ["done"]


async def test_a_peer_without_certificate_is_refused(serve: Serve, certificates: Certificates) -> None:
    served = await serve(tls=certificates)
    only_ca = grpc.ssl_channel_credentials(certificates.ca.read_bytes())
    async with open_channel(served.address, only_ca) as channel:
        error = await _error(_first(channel))
    assert type(error) in (PermissionRefused, Unavailable), error.message


async def test_a_server_of_an_unknown_ca_is_refused_and_named_so(
    serve: Serve, certificates: Certificates, tmp_path: Path
) -> None:
    served = await serve(tls=certificates)
    other = make(tmp_path)
    async with open_channel(served.address, channel_credentials(other.security())) as channel:
        error = await _error(_first(channel))
    assert type(error) is PermissionRefused, error.message
    assert "TLS" in error.message


async def _first(channel: grpc.aio.Channel) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    await stub.Generate(inference_pb2.GenerateRequest(text="a"), timeout=CALL_S).read()


def test_tls_files_that_cannot_be_read_refuse_to_start(certificates: Certificates) -> None:
    missing = certificates.security().model_copy(update={"tls_cert": Path("/nonexistent.pem")})
    with pytest.raises(ConfigInvalid, match=r"/nonexistent\.pem"):
        server_credentials(missing, clients_need_certificates=False)
    no_ca = certificates.security().model_copy(update={"tls_ca": None})
    with pytest.raises(ConfigInvalid, match="tls_ca"):
        server_credentials(no_ca, clients_need_certificates=True)
