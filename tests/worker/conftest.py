"""Owns the fixtures of the worker's tests: a controller twin, and worker processes that end with the test."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.worker.controller_twin import ControllerTwin
from tests.worker.processes import WORKER, WorkerProcess

LOG_CHARS = 4000  # of a worker's log, its end


class StartWorker(Protocol):
    async def __call__(
        self,
        worker_id: str,
        roles: str,
        *sets: str,
        engine_module: str = ...,
        step_ms: float = ...,
        module: str = ...,
    ) -> WorkerProcess: ...


@pytest.fixture
async def controller() -> AsyncIterator[ControllerTwin]:
    twin = await ControllerTwin("c0").start()
    yield twin
    await twin.close()


@pytest.fixture
async def start_worker(controller: ControllerTwin, tmp_path: Path) -> AsyncIterator[StartWorker]:
    started: list[WorkerProcess] = []

    async def start(
        worker_id: str,
        roles: str,
        *sets: str,
        engine_module: str = "tests.worker.modelled_child",
        step_ms: float = 1.0,
        module: str = WORKER,
    ) -> WorkerProcess:
        worker = await WorkerProcess.start(
            worker_id,
            roles,
            controller.address,
            tmp_path,
            sets=sets,
            engine_module=engine_module,
            step_ms=step_ms,
            module=module,
        )
        started.append(worker)
        return worker

    yield start
    for worker in started:
        await worker.close()
        sys.stderr.write(f"{worker.worker_id}: {worker.log.read_text()[-LOG_CHARS:]}\n")  # shown where the test failed
