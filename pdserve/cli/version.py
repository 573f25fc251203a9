"""Owns `pdserve version`: of this client, and of the cluster where one answers."""

from __future__ import annotations

import argparse
import platform

from pdserve.cli.access import get
from pdserve.cli.options import EXIT_OK, Commands, access, command, reaching
from pdserve.cli.terminal import Terminal
from pdserve.errors import PdserveError
from pdserve.installed_version import installed_version


def add(commands: Commands) -> None:
    reaching(command(commands, "version", "show versions", show_version))


def show_version(options: argparse.Namespace, terminal: Terminal) -> int:
    client = installed_version()
    cluster: str | None = None
    try:
        with access(options).http(timeout_s=3.0) as http:
            cluster = get(http, "/api/v1/status").text("version")
    except PdserveError:
        cluster = None  # that no cluster answers is no error of this command
    terminal.say(f"pdserve {client} (python {platform.python_version()})")
    terminal.say(f"cluster {cluster}" if cluster else "no cluster answers; start one with: pdserve up --detach")
    terminal.result({"client": client, "cluster": cluster, "python": platform.python_version()})
    return EXIT_OK
