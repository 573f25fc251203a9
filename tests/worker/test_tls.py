"""Workers of a cluster with a CA: registration, sessions and hand-offs under mutual TLS, and nothing without."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from pdserve.errors import ConfigInvalid
from pdserve.rpc_errors import error_from_rpc
from pdserve.v1 import kv_pull_pb2, kv_pull_pb2_grpc, worker_pb2, worker_pb2_grpc
from service_kit.config import ClusterConfig, SecurityConfig, WorkerConfig
from tests.worker import commands
from tests.worker.controller_twin import ControllerTwin
from tests.worker.processes import WorkerProcess
from tests.worker.test_handoffs import PROMPT, Pair
from worker_runtime.grpc_endpoint import GrpcEndpoint, check_worker_exposure


@dataclass(frozen=True, slots=True)
class Files:
    ca: Path
    cert: Path
    key: Path

    def sets(self) -> tuple[str, ...]:
        return (f"security.tls_ca={self.ca}", f"security.tls_cert={self.cert}", f"security.tls_key={self.key}")

    def bytes(self) -> tuple[bytes, bytes, bytes]:
        return self.ca.read_bytes(), self.key.read_bytes(), self.cert.read_bytes()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A CA and one certificate of it for 127.0.0.1."""
    directory = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test-ca", "-days", "2")
    openssl("req", *key, "-keyout", "worker.key", "-out", "worker.csr", "-subj", "/CN=worker")
    (directory / "san").write_text("subjectAltName=IP:127.0.0.1")
    openssl(
        *("x509", "-req", "-in", "worker.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
        *("-out", "worker.pem", "-days", "2", "-extfile", "san"),
    )
    return Files(directory / "ca.pem", directory / "worker.pem", directory / "worker.key")


@pytest.mark.slow
async def test_a_hand_off_and_both_sessions_work_under_mutual_tls_and_a_stranger_is_refused(
    files: Files, tmp_path: Path
) -> None:
    ca, key, cert = files.bytes()
    controller = ControllerTwin("c0")
    controller.credentials = grpc.ssl_channel_credentials(ca, key, cert)
    await controller.start(credentials=grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True))
    workers = [
        await WorkerProcess.start(name, role, controller.address, tmp_path, sets=files.sets())
        for name, role in (("p0", "prefill"), ("d0", "decode"))
    ]
    try:
        pair = Pair(await controller.session("p0"), await controller.session("d0"), workers[1], workers[0])
        await pair.start(commands.work(1, PROMPT))
        await pair.decode.until_finished(1)
        opening = worker_pb2.SessionRequest(open=worker_pb2.OpenSession(controller_id="stranger"))
        for channel in (
            grpc.aio.insecure_channel(pair.decode.address),
            grpc.aio.secure_channel(pair.decode.address, grpc.ssl_channel_credentials(ca)),
        ):
            async with channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await worker_pb2_grpc.WorkerServiceStub(channel).Session(iter([opening]), timeout=5).read()
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await kv_pull_pb2_grpc.KvPullServiceStub(channel).Pull(kv_pull_pb2.PullRequest(), timeout=5)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        async with grpc.aio.secure_channel(pair.decode.address, controller.credentials) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await kv_pull_pb2_grpc.KvPullServiceStub(channel).Pull(kv_pull_pb2.PullRequest(), timeout=5)
            assert error_from_rpc(caught.value).reason == "layout_mismatch"
    finally:
        await controller.close()
        for worker in workers:
            await worker.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3"])
def test_a_worker_off_loopback_needs_a_ca_or_the_word_insecure(host: str, files: Files) -> None:
    worker = WorkerConfig(host=host)
    with pytest.raises(ConfigInvalid):
        check_worker_exposure(ClusterConfig(worker=worker))
    with pytest.raises(ConfigInvalid):
        check_worker_exposure(ClusterConfig(worker=worker, security=SecurityConfig(tls_ca=files.ca)))
    check_worker_exposure(ClusterConfig(worker=worker, security=SecurityConfig(insecure=True)))
    mutual = SecurityConfig(tls_ca=files.ca, tls_cert=files.cert, tls_key=files.key)
    check_worker_exposure(ClusterConfig(worker=worker, security=mutual))


async def test_a_tls_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    with pytest.raises(ConfigInvalid, match=r"missing\.pem"):
        GrpcEndpoint(ClusterConfig(security=SecurityConfig(tls_ca=missing, tls_cert=missing, tls_key=missing)))
