"""Owns what the entry points of all processes share: their options, the two signals that end them, and exit codes."""

from __future__ import annotations

import argparse
import asyncio
import signal
from pathlib import Path

EXIT_DRAINED = 0
EXIT_CONFIG = 2
EXIT_FAILED = 70
EXIT_STOPPED_TWICE = 130


class StopSignals:
    """SIGTERM and SIGINT: the first asks to drain, the second to stop. Create it inside a running loop."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.asked: asyncio.Future[None] = loop.create_future()
        self.twice: asyncio.Future[None] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        first = self.asked if not self.asked.done() else self.twice
        if not first.done():
            first.set_result(None)


def option_parser(module: str, description: str, parent_pid: int) -> argparse.ArgumentParser:
    """`parent_pid` is the default of --parent-pid."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--config", type=Path, default=None, metavar="FILE", help="YAML configuration")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one setting")
    parser.add_argument(
        "--parent-pid", type=int, default=parent_pid, help="dies with this process; 0 = lives on its own"
    )
    return parser
