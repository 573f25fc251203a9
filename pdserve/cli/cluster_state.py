"""Owns what the state directory of a local cluster tells: its addresses, its processes, whether it lives."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pdserve.cli.record import Record
from pdserve.errors import InternalError, Unavailable
from pdserve.local_process import LocalProcess

DEFAULT_STATE_DIR = ".pdserve"
STATE_DIR_VARIABLE = "PDSERVE_STATE_DIR"
TAIL_BYTES = 4096


@dataclass(frozen=True, slots=True)
class ProcessNow:
    """One supervised process. `process` is None while it waits to be restarted."""

    name: str
    process: LocalProcess | None
    restarts: int
    last_exit: int | None
    log: Path


@dataclass(frozen=True, slots=True)
class ClusterState:
    """Content of cluster.json."""

    supervisor: LocalProcess
    api_url: str
    grpc_address: str
    processes: Sequence[ProcessNow]

    def pids(self) -> list[LocalProcess]:
        return [self.supervisor, *(row.process for row in self.processes if row.process is not None)]


def default_state_dir() -> Path:
    return Path(os.environ.get(STATE_DIR_VARIABLE) or DEFAULT_STATE_DIR)


def next_command(arguments: str, state_dir: Path) -> str:
    """`pdserve ARGUMENTS` as it must be typed to reach the cluster of `state_dir` from here."""
    place = "" if state_dir.absolute() == default_state_dir().absolute() else f" --state-dir {state_dir}"
    return f"pdserve {arguments}{place}"


def read_state(state_dir: Path) -> ClusterState | None:
    """None where no cluster was started, or it ended as it should. The supervisor may be dead."""
    try:
        record = Record.parse((state_dir / "cluster.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except InternalError as error:
        raise InternalError(f"{state_dir / 'cluster.json'}: {error.message}. Remove it if no cluster runs.") from error
    supervisor = LocalProcess(record.integer("supervisor_pid"), record.integer("supervisor_start_ticks"))
    rows = [_row(row) for row in record.records("processes")]
    return ClusterState(supervisor, record.text("api_url"), record.text("grpc_address"), rows)


def running_state(state_dir: Path) -> ClusterState:
    """Raises Unavailable where no cluster lives there."""
    state = read_state(state_dir)
    if state is None or not state.supervisor.alive():
        raise Unavailable(f"No cluster runs in {state_dir}. Start one with: {next_command('up --detach', state_dir)}")
    return state


def tail(log: Path) -> str:
    """The end of a log file, whole lines."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(_readable(line) for line in lines[-15:])


def _readable(line: str) -> str:
    """What an event of a log in JSON says; other lines, and tracebacks, as they are."""
    try:
        event: object = json.loads(line)
    except ValueError:
        return line
    if not isinstance(event, dict):
        return line
    told = event.get("traceback") or event.get("message")
    return f"{event.get('process')}: {event.get('event')}{f': {told}' if told else ''}"


def _row(row: Record) -> ProcessNow:
    pid = row.integer("pid")
    process = LocalProcess(pid, row.integer("start_ticks")) if pid else None
    last_exit = row.integer("last_exit") if row.has("last_exit") else None
    return ProcessNow(row.text("name"), process, row.integer("restarts"), last_exit, Path(row.text("log")))
