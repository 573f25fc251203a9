"""Owns a redis-server of a benchmark: on a free port, with nothing on disk, killed with the benchmark."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.tied_process import tied

START_S = 30.0
PROGRAM = "redis-server"


def has_redis() -> bool:
    return shutil.which(PROGRAM) is not None


class RedisProcess:
    """Runs between `start` and `kill`, and again after another `start`, empty."""

    def __init__(self, max_bytes: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        self._max_bytes = max_bytes
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    def start(self) -> None:
        """Returns when it takes connections. Raises RuntimeError where it does not."""
        words = {"bind": "127.0.0.1", "port": self._port, "save": "", "appendonly": "no"}
        words |= {"maxmemory": self._max_bytes, "maxmemory-policy": "allkeys-lru"}
        command = [PROGRAM, *(word for name, value in words.items() for word in (f"--{name}", str(value)))]
        self._process = subprocess.Popen(tied(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline_s = time.monotonic() + START_S
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError("redis-server did not start")
            time.sleep(0.01)

    def kill(self) -> None:
        """By SIGKILL, as everything else."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0


@contextmanager
def running_redis(max_bytes: int) -> Iterator[RedisProcess]:
    server = RedisProcess(max_bytes)
    server.start()
    try:
        yield server
    finally:
        server.kill()
