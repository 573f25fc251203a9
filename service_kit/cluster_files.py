"""Owns the files of a state directory: the lock, cluster.json, the effective configuration, one log per process."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

from pdserve.errors import Unavailable
from service_kit.config import ClusterConfig

LOCK_FILE = "supervisor.lock"
CLUSTER_FILE = "cluster.json"
CONTROLLER_FILE = "controller.json"
CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True)
class ProcessRow:
    """One process as cluster.json shows it."""

    name: str
    pid: int  # 0 while it waits to be restarted
    start_ticks: int
    state: Literal["RUNNING", "WAITING", "STOPPED"]
    restarts: int
    last_exit: int | None
    log: str


@dataclass(frozen=True, slots=True)
class ClusterRecord:
    supervisor_pid: int
    supervisor_start_ticks: int
    api_url: str
    grpc_address: str
    processes: Sequence[ProcessRow]


class ClusterFiles:
    """All paths of one state directory."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir.absolute()
        self._lock: IO[bytes] | None = None

    def log(self, name: str) -> Path:
        return self.state_dir / "logs" / f"{name}.log"

    @property
    def config(self) -> Path:
        return self.state_dir / CONFIG_FILE

    def lock(self) -> None:
        """Held until this process ends, however it ends. Raises Unavailable where another supervisor holds it."""
        (self.state_dir / "logs").mkdir(parents=True, exist_ok=True)
        lock = (self.state_dir / LOCK_FILE).open("ab+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise Unavailable(
                f"A cluster runs already in {self.state_dir}. `pdserve status` shows it, `pdserve down` ends it."
            ) from None
        self._lock = lock

    def begin(self, config: ClusterConfig) -> None:
        """Writes what the children read. The last run's logs are kept as NAME.log.1; its addresses are forgotten."""
        for old in (self.state_dir / "logs").glob("*.log"):
            if old.stem != "supervisor":
                old.replace(old.with_name(f"{old.name}.1"))
        self._remove(CLUSTER_FILE, CONTROLLER_FILE)
        _write_whole(self.config, config.model_dump_json(indent=1))

    def publish(self, record: ClusterRecord) -> None:
        _write_whole(self.state_dir / CLUSTER_FILE, json.dumps(asdict(record), indent=1))

    def end(self) -> None:
        self._remove(CLUSTER_FILE, CONTROLLER_FILE)

    def _remove(self, *names: str) -> None:
        for name in names:
            (self.state_dir / name).unlink(missing_ok=True)


def _write_whole(path: Path, text: str) -> None:
    """Whole or not at all: others read it at any time."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)
