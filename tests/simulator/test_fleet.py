"""Fleets: many whole workers with modelled engines, over real gRPC, in one process and in several."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from engine.protocol import Submit
from kv_transfer.keys import chain_hashes
from pdserve.v1 import types_pb2, worker_pb2
from service_kit.config import ClusterConfig
from simulator.fleet import Fleet, FleetSettings, share
from simulator.modelled_engine import ModelledConfig
from tests.child_processes import tied
from tests.simulator.stub_controller import StubController, dispatch_id, stub_controller
from tests.simulator.works import Bench, with_max_tokens, work

PROMPT = list(range(100, 150))
OUTPUT_TOKENS = 12
DEADLINE_S = 60.0


def proto_work(key: int) -> worker_pb2.Work:
    token_ids = array("i", PROMPT).tobytes()
    return worker_pb2.Work(
        dispatch=dispatch_id(key),
        request_id=f"r{key}",
        choices=[0],
        token_ids=token_ids,
        prompt_tokens=len(PROMPT),
        sampling=types_pb2.SamplingParams(seed=7, max_tokens=OUTPUT_TOKENS, temperature=1.0),
        block_hashes=chain_hashes(b"r" * 32, token_ids),
    )


@asynccontextmanager
async def open_fleet(controller: StubController, prefill: int, decode: int) -> AsyncIterator[Fleet]:
    config = ClusterConfig(controllers=(controller.address,))
    fleet = await Fleet.open(FleetSettings(prefill, decode, 0, ModelledConfig()), config)
    running = asyncio.create_task(fleet.run())
    try:
        yield fleet
    finally:
        running.cancel()
        await asyncio.wait([running], timeout=DEADLINE_S)
        assert running.done(), "the fleet does not end"
        await fleet.close()


async def through(controller: StubController, key: int, prefill: str, decode: str) -> list[int]:
    """One request through both workers; its tokens in order of output index."""
    source, destination = controller.workers[prefill], controller.workers[decode]
    destination.send(worker_pb2.SessionRequest(reserve=worker_pb2.Reserve(work=proto_work(key))))

    def granted() -> worker_pb2.Grant | None:
        for response in destination.responses:
            if response.HasField("reserve") and response.reserve.dispatch.request_key == key:
                assert response.reserve.HasField("granted"), response.reserve.refused
                return response.reserve.granted
        return None

    grant = await controller.until(granted)
    order = worker_pb2.Prefill(work=proto_work(key), grant=grant, decode_address=destination.info.address)
    source.send(worker_pb2.SessionRequest(prefill=order))

    def whole() -> list[int] | None:
        tokens: dict[int, int] = {}
        for response in (*source.responses, *destination.responses):
            batch = response.tokens
            for column, request_key in enumerate(batch.request_keys):
                if request_key == key:
                    tokens[batch.indices[column]] = batch.token_ids[column]
        return [tokens[index] for index in sorted(tokens)] if len(tokens) == OUTPUT_TOKENS else None

    return await controller.until(whole)


def alone() -> list[int]:
    bench = Bench()
    bench.engine.handle(Submit(work(PROMPT, sampling=with_max_tokens(OUTPUT_TOKENS)), "generate"))
    bench.run()
    return bench.sink.tokens()


async def test_a_request_through_a_fleet_gives_the_tokens_of_one_engine() -> None:
    async with stub_controller() as controller, open_fleet(controller, 2, 2):
        await controller.sessions(4)
        assert await through(controller, 1, "p1", "d0") == alone()


async def test_a_fleet_of_many_workers_registers_and_serves_many_requests_at_once() -> None:
    async with stub_controller() as controller, open_fleet(controller, 20, 20):
        await controller.sessions(40)
        requests = [through(controller, key, f"p{key % 20}", f"d{key % 20}") for key in range(1, 61)]
        expected = alone()
        assert all(tokens == expected for tokens in await asyncio.gather(*requests))


@pytest.mark.slow
async def test_a_fleet_over_two_processes_ends_whole_on_sigterm(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL))
    config = tmp_path / "cluster.yaml"
    config.write_text(json.dumps({"model": {"path": str(model)}, "log": {"level": "warning"}}))
    async with stub_controller() as controller:
        command = f"-m simulator.fleet --controllers {controller.address} --config {config} --cost instant"
        shape = "--prefill 3 --decode 2 --processes 2"
        process = await asyncio.create_subprocess_exec(*tied([sys.executable, *command.split(), *shape.split()]))
        try:
            await controller.sessions(5)
            assert {worker_id.partition("-")[0] for worker_id in controller.workers} == {"f0", "f1"}
            parts = psutil.Process(process.pid).children()
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(DEADLINE_S):
                assert await process.wait() == 0
            assert not any(part.is_running() for part in parts)
        finally:
            if process.returncode is None:
                process.kill()
                async with asyncio.timeout(DEADLINE_S):
                    await process.wait()


MODEL = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "eos_token_id": [0, 4],
}


def test_workers_are_shared_out_evenly_and_completely() -> None:
    for count in range(12):
        parts = [share(count, 5, part) for part in range(5)]
        assert sum(parts) == count
        assert max(parts) - min(parts) <= 1
