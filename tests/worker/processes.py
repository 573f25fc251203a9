"""Owns real worker processes for tests: `python -m worker`, ended by their pid."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.child_processes import REAP_S

ROOT = Path(__file__).resolve().parents[2]
WORKER = "worker"
MODELLED = "tests.worker.modelled_child"
NATIVE = "worker.engine_main"
# A worker that gets no turn for seconds on a busy machine is neither silent nor away, and what it loads is waited for.
PATIENT = ("transfer.heartbeat_misses=20", "transfer.connect_s=30", "store.load_deadline_s=30")


class WorkerProcess:
    def __init__(self, process: asyncio.subprocess.Process, worker_id: str, log: Path) -> None:
        self.process = process
        self.worker_id = worker_id
        self.log = log

    @classmethod
    async def start(
        cls,
        worker_id: str,
        roles: str,
        controller: str,
        directory: Path,
        *,
        sets: Sequence[str] = (),
        engine_module: str = MODELLED,
        step_ms: float = 1.0,
        module: str = WORKER,
    ) -> WorkerProcess:
        tiers = ["store.host_bytes=33554432", "store.disk_bytes=0"]
        reach = [f'controllers=["{controller}"]', "transfer.transport=tcp", "worker.heartbeat_s=0.3"]
        settings = [*reach, *PATIENT, *tiers, *sets]
        arguments = ["--id", worker_id, "--roles", roles, "--engine-module", engine_module]
        for setting in settings:
            arguments += ["--set", setting]
        log = directory / f"{worker_id}.log"
        with log.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                *arguments,
                cwd=ROOT,
                env={**os.environ, "STEP_MS": str(step_ms)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
            )
        return cls(process, worker_id, log)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    async def exit_code(self, deadline_s: float = 30.0) -> int:
        async with asyncio.timeout(deadline_s):
            return await self.process.wait()

    async def close(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        async with asyncio.timeout(REAP_S):
            await self.process.wait()


def alive(pid: int) -> bool:
    """Whether `pid` runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def ended(pid: int, deadline_s: float) -> None:
    """Waits for the end of any process, child or not."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_reader(descriptor, over.set)
    try:
        async with asyncio.timeout(deadline_s):
            await over.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
