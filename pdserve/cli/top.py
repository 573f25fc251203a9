"""Owns `pdserve top`: the status, again and again."""

from __future__ import annotations

import argparse
import time

from pdserve.cli.access import get
from pdserve.cli.options import EXIT_OK, Commands, access, command, reaching
from pdserve.cli.status import show
from pdserve.cli.terminal import Terminal

CLEAR = "\x1b[H\x1b[2J"


def add(commands: Commands) -> None:
    parser = command(commands, "top", "watch the cluster", top)
    reaching(parser)
    parser.add_argument("--once", action="store_true", help="one look")
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between looks")


def top(options: argparse.Namespace, terminal: Terminal) -> int:
    """Until Ctrl-C. In JSON form one object per look."""
    with access(options).http(timeout_s=10.0) as http:
        while True:
            answer = get(http, "/api/v1/status")
            if terminal.interactive and not options.once:
                terminal.write(CLEAR)
            show(answer, terminal)
            terminal.result(answer.plain())
            if options.once:
                return EXIT_OK
            try:
                time.sleep(max(options.interval, 0.1))
            except KeyboardInterrupt:
                return EXIT_OK
