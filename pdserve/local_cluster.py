"""Owns a cluster that a program starts for itself: `pdserve up` as a child, ended with it."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pdserve.errors import InternalError, Unavailable

STOP_S = 60.0


@dataclass(frozen=True, slots=True)
class LocalPool:
    """What `pdserve up` is told."""

    prefill: int = 1
    decode: int = 1
    both: int = 0
    model: str = ""  # empty = the model of the repository
    transport: str = "auto"
    settings: tuple[str, ...] = ()  # "engine.block_tokens=32", see docs/config.md


class LocalCluster:
    """Runs until `stop`, or until this process ends: the child watches its standard input."""

    def __init__(self, child: subprocess.Popen[str], state_dir: Path, api_url: str, grpc_address: str) -> None:
        self._child = child
        self._state_dir = state_dir
        self.api_url = api_url
        self.grpc_address = grpc_address

    @classmethod
    def start(cls, pool: LocalPool) -> LocalCluster:
        """Returns when a first request was answered. Raises Unavailable with what `pdserve up` said."""
        state_dir = Path(tempfile.mkdtemp(prefix="pdserve-"))
        with (state_dir / "up.log").open("w") as log:
            child = subprocess.Popen(
                _command(pool, state_dir), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        try:
            # `up` has deadlines for every part of the start, so this line comes, or the end of the file.
            line = _output(child).readline()
            answer = json.loads(line) if line else {}
            if "api_url" not in answer:
                child.wait(STOP_S)
                raise Unavailable(f"The local cluster did not start: {(state_dir / 'up.log').read_text()[-4000:]}")
            return cls(child, state_dir, str(answer["api_url"]), str(answer["grpc_address"]))
        except BaseException:
            _end(child)
            shutil.rmtree(state_dir, ignore_errors=True)
            raise

    def stop(self) -> None:
        """Drains, ends every process, removes the state directory. A second call does nothing."""
        _end(self._child)
        shutil.rmtree(self._state_dir, ignore_errors=True)


def _command(pool: LocalPool, state_dir: Path) -> list[str]:
    command = [sys.executable, "-m", "pdserve.cli.main", "up", "-o", "json", "--while-stdin", "--port", "0"]
    command += ["--state-dir", str(state_dir), "--transport", pool.transport]
    command += ["--prefill", str(pool.prefill), "--decode", str(pool.decode), "--both", str(pool.both)]
    command += ["--model", pool.model] if pool.model else []
    for setting in pool.settings:
        command += ["--set", setting]
    return command


def _output(child: subprocess.Popen[str]) -> IO[str]:
    if child.stdout is None:
        raise InternalError("a child without output")
    return child.stdout


def _end(child: subprocess.Popen[str]) -> None:
    """Closes its input, on which it drains and ends; kills it where that takes too long."""
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    try:
        child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()  # its processes are tied to its life
        child.wait()
