"""The controller as a process: start, state file, signals, refusals, the tie to its parent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from pdserve.v1 import membership_pb2, membership_pb2_grpc
from tests.child_processes import REAP_S, end, tied
from tests.controller.worker_twin import DECODE, PREFILL, WorkerTwin
from tests.tokenization.fixtures import byte_level_backend, write_model_dir

pytestmark = pytest.mark.slow

DEADLINE_S = 60.0


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = write_model_dir(tmp_path / "model", byte_level_backend())
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 5000}))
    return folder


@dataclass
class Controller:
    process: subprocess.Popen[bytes]
    state_dir: Path

    def state(self) -> dict[str, str | int]:
        found: dict[str, str | int] = json.loads((self.state_dir / "controller.json").read_text())
        return found

    @property
    def api_url(self) -> str:
        return str(self.state()["api_url"])


def command(model_dir: Path, *settings: str, parent_pid: int | None = None) -> list[str]:
    state_dir = model_dir.parent / "state"
    chosen = (f"model.path={model_dir}", f"state_dir={state_dir}", "controller.port=0", *settings)
    tie = ["--parent-pid", str(os.getpid() if parent_pid is None else parent_pid)]
    return [sys.executable, "-m", "controller", *tie, *(part for each in chosen for part in ("--set", each))]


async def until(condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110 (conditions have no event)
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {DEADLINE_S} s: {what}") from None


@asynccontextmanager
async def running(model_dir: Path, *settings: str) -> AsyncIterator[Controller]:
    process = subprocess.Popen(command(model_dir, *settings))  # noqa: ASYNC220 (it returns at once)
    controller = Controller(process, model_dir.parent / "state")
    try:
        await until((controller.state_dir / "controller.json").exists, "controller.json")
        yield controller
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(REAP_S)


@asynccontextmanager
async def with_worker(controller: Controller) -> AsyncIterator[WorkerTwin]:
    worker = WorkerTwin({}, "b0", (PREFILL, DECODE), max_context=5000, step_s=0.005)
    await worker.start()
    try:
        async with grpc.aio.insecure_channel(str(controller.state()["grpc_address"])) as channel:
            stub = membership_pb2_grpc.MembershipServiceStub(channel)
            await stub.RegisterWorker(membership_pb2.RegisterWorkerRequest(worker=worker.info()))
        await until(lambda: worker.session is not None, "session")
        yield worker
    finally:
        await worker.kill()


async def test_it_says_where_it_listens_and_serves_there(model_dir: Path) -> None:
    async with running(model_dir) as controller, with_worker(controller):
        assert controller.state()["pid"] == controller.process.pid
        async with httpx.AsyncClient(base_url=controller.api_url, timeout=20) as client:
            answer = await client.post("/v1/completions", json={"prompt": "def read", "max_tokens": 5})
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 5
            status = (await client.get("/api/v1/status")).json()
            assert [worker["id"] for worker in status["workers"]] == ["b0"]
            assert (await client.get("/metrics")).text.count("pdserve_time_to_first_token_seconds_count 1.0") == 1


async def test_sigterm_lets_running_streams_end_and_refuses_new_ones(model_dir: Path) -> None:
    async with running(model_dir) as controller, with_worker(controller) as worker:
        async with httpx.AsyncClient(base_url=controller.api_url, timeout=20) as client:
            body = {"prompt": "def", "max_tokens": 500, "ignore_eos": True}
            streaming = asyncio.create_task(client.post("/v1/completions", json=body))
            await until(lambda: bool(worker.runs), "running")
            controller.process.send_signal(signal.SIGTERM)
            await until_refused(client)
            answer = await streaming
        assert answer.json()["usage"]["completion_tokens"] == 500
        assert await asyncio.to_thread(controller.process.wait, DEADLINE_S) == 0


async def test_a_stream_that_nobody_reads_is_cut_and_cancelled_at_its_worker(model_dir: Path) -> None:
    body = {"prompt": "def", "max_tokens": 4000, "n": 8, "logprobs": 1, "ignore_eos": True, "stream": True}
    payload = json.dumps(body).encode()
    async with running(model_dir, "controller.client_stall_s=0.5") as controller, with_worker(controller) as worker:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", httpx.URL(controller.api_url).port or 0))
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
            connection.sendall(b"content-length: %d\r\n\r\n" % len(payload) + payload)
            await until(lambda: bool(worker.cancelled), "cancelled at the worker")
            assert not worker.runs


async def until_refused(client: httpx.AsyncClient) -> None:
    """New requests are. What comes before is answered by the worker, in this very loop."""
    async with asyncio.timeout(DEADLINE_S):
        while (await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})).status_code != 503:
            pass


async def test_a_second_signal_stops_at_once(model_dir: Path) -> None:
    async with (
        running(model_dir) as controller,
        with_worker(controller) as worker,
        httpx.AsyncClient(base_url=controller.api_url, timeout=20) as client,
    ):
        body = {"prompt": "def", "max_tokens": 4000, "ignore_eos": True}
        streaming = asyncio.create_task(client.post("/v1/completions", json=body))
        await until(lambda: bool(worker.runs), "running")
        controller.process.send_signal(signal.SIGTERM)
        await until_refused(client)
        controller.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(controller.process.wait, DEADLINE_S) == 130
        await asyncio.gather(streaming, return_exceptions=True)


async def test_a_worker_finds_the_controller_that_was_started_again(model_dir: Path) -> None:
    async with running(model_dir) as controller, with_worker(controller) as worker:
        port = str(controller.state()["grpc_address"]).rpartition(":")[2]
        first = worker.session
        end(controller.process)
        (controller.state_dir / "controller.json").unlink()
        async with running(model_dir, f"controller.grpc_port={port}") as again:
            assert str(again.state()["grpc_address"]).endswith(f":{port}")
            async with with_worker(again) as registered:
                assert registered.session is not first


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("model.path=/nonexistent", "model.path"),
        ("controller.host=0.0.0.0", "PDSERVE_API_KEYS"),
        ("controller.placement=best", "least-loaded"),
        ("controller.queue_limit=-1", "queue_limit"),
        ("security.tls_cert=/nonexistent", "tls_key"),
    ],
)
def test_it_refuses_to_start_and_says_why(model_dir: Path, setting: str, told: str) -> None:
    done = subprocess.run(command(model_dir, setting), capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 2
    assert told in done.stderr


async def test_a_taken_port_is_named(model_dir: Path) -> None:
    async with running(model_dir) as controller:
        port = controller.api_url.rpartition(":")[2]
        taken = command(model_dir, f"controller.port={port}")
        done = await asyncio.to_thread(
            subprocess.run, taken, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert done.returncode == 2
        assert port in done.stderr


async def test_it_dies_with_its_parent(model_dir: Path) -> None:
    arguments = command(model_dir, parent_pid=0)
    arguments[arguments.index("--parent-pid") : arguments.index("--parent-pid") + 2] = []
    script = f"import subprocess, sys, time; subprocess.Popen({arguments!r}); time.sleep(600)"
    parent = subprocess.Popen(tied([sys.executable, "-c", script]))  # noqa: ASYNC220 (it returns at once)
    state = model_dir.parent / "state" / "controller.json"
    try:
        await until(state.exists, "controller.json")
        pid = json.loads(state.read_text())["pid"]
        assert psutil.pid_exists(pid)
    finally:
        end(parent)
    await until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "dead")
