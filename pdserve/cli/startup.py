"""Owns watching a cluster start: progress per component, and the reason where it does not come up."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from pdserve.cli.access import Access, api_key_from_environment, get, local_access
from pdserve.cli.cluster_state import read_state, tail
from pdserve.cli.record import Record
from pdserve.cli.terminal import Terminal, seconds
from pdserve.errors import DeadlineExceeded, PdserveError, Unavailable

POLL_S = 0.1
TICK_S = 5.0  # between signs of life while nothing changes
FATAL_RESTARTS = 2  # of one process, before it was ready once
EXIT_CONFIG = 2


@dataclass(slots=True)
class Startup:
    """`wait` returns when every worker is READY."""

    state_dir: Path
    supervisor: subprocess.Popen[bytes]
    terminal: Terminal
    workers: int
    began_s: float = field(default_factory=time.monotonic)
    ready_s: dict[str, float] = field(default_factory=dict)  # by component
    _said_s: float = 0.0

    def wait(self, deadline_s: float) -> Access:
        """Raises Unavailable where a component cannot live, DeadlineExceeded where it takes too long."""
        self._said_s = self.began_s
        while True:
            self._check_supervisor()
            self._check_processes()
            access = self._look()
            if access is not None:
                return access
            if self._elapsed() > deadline_s:
                missing = ", ".join(self._missing()) or "nothing"
                raise DeadlineExceeded(
                    f"The cluster is not ready after {deadline_s:.0f} s; still starting: {missing}. "
                    f"See the logs in {self.state_dir / 'logs'}."
                )
            self._sign_of_life()
            time.sleep(POLL_S)

    def _elapsed(self) -> float:
        return time.monotonic() - self.began_s

    def _look(self) -> Access | None:
        """Notes what has become ready since the last look; the access once everything has."""
        try:
            access = local_access(self.state_dir)
            with access.http(timeout_s=2.0) as http:
                status = get(http, "/api/v1/status")
        except Unavailable:
            return None
        self._note("controller", access.api_url)
        rows = [row for row in status.records("workers") if row.text("state") == "READY"]
        for row in rows:
            self._note(row.text("id"), _described(row))
        return access if len(rows) >= self.workers else None

    def _note(self, name: str, text: str) -> None:
        if name not in self.ready_s:
            self._said_s = time.monotonic()
            self.ready_s[name] = self._elapsed()
            self.terminal.progress("ok", name, f"{seconds(self.ready_s[name]):>7}  {text}")

    def _check_supervisor(self) -> None:
        code = self.supervisor.poll()
        if code is not None:
            log = self.state_dir / "logs" / "supervisor.log"
            raise Unavailable(f"The supervisor ended with status {code}.\n{tail(log)}")

    def _check_processes(self) -> None:
        state = read_state(self.state_dir)
        for row in state.processes if state is not None else ():
            hopeless = row.restarts >= FATAL_RESTARTS or row.last_exit == EXIT_CONFIG
            if hopeless and row.name not in self.ready_s:
                raise Unavailable(
                    f"{row.name} does not start (exit status {row.last_exit}, {row.restarts} restarts); "
                    f"the end of {row.log}:\n{tail(row.log)}"
                )

    def _sign_of_life(self) -> None:
        now = time.monotonic()
        if now - self._said_s >= TICK_S:
            self._said_s = now
            self.terminal.progress(
                "info", "waiting", f"{seconds(self._elapsed()):>7}  for {', '.join(self._missing())}"
            )

    def _missing(self) -> list[str]:
        state = read_state(self.state_dir)
        names = [row.name for row in state.processes] if state is not None else ["supervisor"]
        return [name for name in names if name not in self.ready_s]


def _described(row: Record) -> str:
    transports = "+".join(sorted({endpoint.text("transport") for endpoint in row.records("kv_endpoints")}))
    return f"{'+'.join(row.texts('roles'))}, pid {row.integer('pid')}, KV over {transports or 'nothing'}"


def already_running(state_dir: Path) -> Access | None:
    """Access to the cluster that runs in `state_dir`, if one does."""
    state = read_state(state_dir)
    if state is None or not state.supervisor.alive():
        return None
    try:
        return local_access(state_dir)
    except PdserveError:
        return Access(state.api_url, state.grpc_address, api_key_from_environment())
