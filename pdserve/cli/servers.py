"""Owns the border to the server packages, which the SDK's wheel does not hold: are they there, what is configured, start them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from pdserve.cli.record import Record
from pdserve.errors import ConfigInvalid, InternalError, Unavailable

SERVER_PACKAGES = ("service_kit", "controller", "worker")
_CONFIG_DEADLINE_S = 30.0


def require_servers() -> None:
    """Raises Unavailable where the servers are not installed beside this CLI."""
    missing = [name for name in SERVER_PACKAGES if find_spec(name) is None]
    if missing:
        raise Unavailable(
            f"The server packages are not installed here ({', '.join(missing)} missing); this is the client alone. "
            "Run `make up` in a checkout of the repository, or use the SDK against a cluster that runs elsewhere."
        )


def read_config(config: Path | None, sets: Sequence[str]) -> Record:
    """The validated configuration, model path and state_dir absolute. Raises ConfigInvalid."""
    command = [*_supervisor(config, sets), "--print-config"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_CONFIG_DEADLINE_S, check=False)
    if done.returncode == 2:
        raise ConfigInvalid(done.stderr.strip())
    if done.returncode != 0:
        raise InternalError(f"the configuration could not be read: {done.stderr.strip()[-2000:]}")
    return Record.parse(done.stdout)


def fetch_model(hub_id: str) -> str:
    """Directory of a hub checkpoint, downloaded if need be; its progress goes to stderr. Raises ConfigInvalid."""
    command = [sys.executable, "-m", "service_kit.hub_model", hub_id]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # as long as a download takes
    if done.returncode != 0:
        raise ConfigInvalid(f"The model {hub_id!r} cannot be had, see above. Give a directory: pdserve up --model DIR")
    return done.stdout.strip()


def start_supervisor(config: Path | None, sets: Sequence[str], log: Path, *, tied: bool) -> subprocess.Popen[bytes]:
    """In a session of its own. tied: it dies with this process (foreground). Raises ConfigInvalid where `log` cannot be written."""
    command = [*_supervisor(config, sets), "--parent-pid", str(os.getpid() if tied else 0)]
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("wb")
    except OSError as error:
        raise ConfigInvalid(
            f"state_dir: {log} cannot be written: {error.strerror}. Choose another: pdserve up --state-dir DIR"
        ) from error
    with output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)


def _supervisor(config: Path | None, sets: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "service_kit.supervisor"]
    if config is not None:
        command += ["--config", str(config)]
    for assignment in sets:
        command += ["--set", assignment]
    return command
