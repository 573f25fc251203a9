"""Owns `pdserve doctor`: checks the environment and names the remedies."""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from pdserve.cli.access import get, local_access
from pdserve.cli.cluster_state import next_command, read_state
from pdserve.cli.options import EXIT_CHECK_FAILED, EXIT_OK, Commands, command
from pdserve.cli.preflight import Check, preflight
from pdserve.cli.servers import read_config, require_servers
from pdserve.cli.terminal import Terminal, size
from pdserve.errors import PdserveError

LEAST_DISK_BYTES = 10**9


def add(commands: Commands) -> None:
    parser = command(commands, "doctor", "check the environment, name the remedies", doctor)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML configuration")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one setting; repeatable")


def doctor(options: argparse.Namespace, terminal: Terminal) -> int:
    checks = [*_environment(options), _disk(options.state_dir), _cores(), _ucx_settings(), _cluster(options.state_dir)]
    for check in checks:
        terminal.line(check.mark, check.name, check.text + (f". {check.remedy}" if check.remedy else ""))
    failed = any(check.mark == "fail" for check in checks)
    terminal.result({"healthy": not failed, "checks": [asdict(check) for check in checks]})
    return EXIT_CHECK_FAILED if failed else EXIT_OK


def _environment(options: argparse.Namespace) -> list[Check]:
    try:
        require_servers()
        return preflight(read_config(options.config, options.set))
    except PdserveError as error:
        return [Check("fail", "servers", error.message)]


def _disk(state_dir: Path) -> Check:
    existing = next(path for path in (state_dir, *state_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    text = f"{size(free)} free for {state_dir}"
    if not os.access(existing, os.W_OK):
        return Check("fail", "state dir", f"{existing} cannot be written", "Choose another: --state-dir DIR")
    if free < LEAST_DISK_BYTES:
        return Check("warn", "state dir", text, "Logs need room: --state-dir DIR elsewhere.")
    return Check("ok", "state dir", text)


def _cores() -> Check:
    count = len(os.sched_getaffinity(0))
    if count < 2:
        return Check("warn", "cores", str(count), "Workers share one core; expect little.")
    return Check("ok", "cores", str(count))


def _ucx_settings() -> Check:
    """UCX reads its own variables; those that are set here win over the profile."""
    found = sorted(name for name in os.environ if name.startswith("UCX_"))
    if found:
        return Check(
            "warn", "ucx", f"{', '.join(found)} set", "They override transfer.profile; unset them if KV is slow."
        )
    return Check("ok", "ucx", "no UCX_* variable overrides transfer.profile")


def _cluster(state_dir: Path) -> Check:
    try:
        state = read_state(state_dir)
        if state is None:
            return Check("info", "cluster", "none runs here", f"Start one: {next_command('up --detach', state_dir)}")
        if not state.supervisor.alive():
            return Check("warn", "cluster", "ended without cleaning up", f"Run: {next_command('down', state_dir)}")
        with local_access(state_dir).http(timeout_s=5.0) as http:
            rows = get(http, "/api/v1/status").records("workers")
    except PdserveError as error:
        return Check("fail", "cluster", error.message)
    leaked = sum(row.integer("blocks_leaked") for row in rows)
    lost = [row.text("id") for row in rows if row.text("state") != "READY"]
    if leaked:
        return Check("fail", "cluster", f"{leaked} KV blocks leaked", "Please report this with the logs.")
    if lost:
        return Check("warn", "cluster", f"not ready: {', '.join(lost)}", f"See: {next_command('status', state_dir)}")
    return Check("ok", "cluster", f"{len(rows)} workers ready at {state.api_url}")
