"""Owns a real redis-server for tests: on a free port, with nothing on disk, ended by its process id."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.child_processes import end, tied

START_S = 60.0


class RedisServer:
    """extra: arguments of redis-server besides. tls_files: certificate, key and CA, then it speaks only TLS."""

    def __init__(
        self, folder: Path, extra: Sequence[str] = (), tls_files: tuple[Path, Path, Path] | None = None
    ) -> None:
        self.port = _free_port()
        self._folder = folder
        self._extra = list(extra)
        self._tls_files = tls_files
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def start(self) -> None:
        """Returns when it takes connections."""
        command = [
            "redis-server",
            "--save",
            "",
            "--appendonly",
            "no",
            "--bind",
            "127.0.0.1",
            "--dir",
            str(self._folder),
        ]
        if self._tls_files is None:
            command += ["--port", str(self.port)]
        else:
            cert, key, ca = map(str, self._tls_files)
            command += ["--port", "0", "--tls-port", str(self.port), "--tls-cert-file", cert, "--tls-key-file", key]
            command += ["--tls-ca-cert-file", ca, "--tls-auth-clients", "no"]
        self._process = subprocess.Popen(
            tied([*command, *self._extra]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline_s = time.monotonic() + START_S
        while not _listens(self.port):
            assert self.process.poll() is None, "redis-server ended at once"
            assert time.monotonic() < deadline_s, "redis-server did not start"
            time.sleep(0.01)

    def kill(self) -> None:
        end(self.process)

    def freeze(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)


@contextmanager
def running_redis(
    folder: Path, extra: Sequence[str] = (), tls_files: tuple[Path, Path, Path] | None = None
) -> Iterator[RedisServer]:
    server = RedisServer(folder, extra, tls_files)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
