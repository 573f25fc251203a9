"""Owns the entry point of the controller: `python -m controller --config FILE [--set a.b=c]`."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import uvloop

from controller.controller_node import ControllerNode
from pdserve.errors import ConfigInvalid, PdserveError
from service_kit.api_keys import ApiKeys, api_keys_from
from service_kit.config import ClusterConfig
from service_kit.config_file import load_config
from service_kit.logs import configure_logs, get_logger
from service_kit.process import die_with_parent

EXIT_DRAINED = 0
EXIT_CONFIG = 2
EXIT_FAILED = 70
EXIT_STOPPED_TWICE = 130

log = get_logger(__name__)


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.parent_pid:
        die_with_parent(options.parent_pid)
    try:
        config = load_config(options.config, options.set)
        keys = api_keys_from(os.environ)
    except ConfigInvalid as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_CONFIG
    configure_logs(config.log, "controller")
    return uvloop.run(_serve(config, keys))


async def _serve(config: ClusterConfig, keys: ApiKeys) -> int:
    stop = _Stop()
    try:
        node = await ControllerNode.open(config, keys, _version())
    except ConfigInvalid as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_CONFIG
    except PdserveError as error:
        log.error("controller_failed", reason=error.reason, message=error.message)
        return EXIT_FAILED
    try:
        return await stop.supervise(node)
    except Exception as error:
        log.exception("controller_failed", error)
        return EXIT_FAILED
    finally:
        await node.close()


class _Stop:
    """SIGTERM and SIGINT: the first drains, the second stops."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._asked: asyncio.Future[None] = loop.create_future()
        self._twice: asyncio.Future[None] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)

    async def supervise(self, node: ControllerNode) -> int:
        """Until the node has drained or the second signal came. Raises what the node's run raises."""
        running = asyncio.create_task(node.run(), name="controller")
        await asyncio.wait([running, self._asked], return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            draining = asyncio.create_task(node.drain(), name="controller-drain")
            await asyncio.wait([running, draining, self._twice], return_when=asyncio.FIRST_COMPLETED)
            draining.cancel()
            node.stop()
        await asyncio.wait([running, self._twice], return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            running.cancel()
            await asyncio.wait([running])
            return EXIT_STOPPED_TWICE
        running.result()
        return EXIT_STOPPED_TWICE if self._twice.done() else EXIT_DRAINED

    def _signalled(self) -> None:
        first = self._asked if not self._asked.done() else self._twice
        if not first.done():
            first.set_result(None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m controller", description="The controller of a pdserve cluster.")
    parser.add_argument("--config", type=Path, default=None, metavar="FILE", help="YAML configuration")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one setting")
    parser.add_argument(
        "--parent-pid", type=int, default=os.getppid(), help="dies with this process; 0 = lives on its own"
    )
    return parser


def _version() -> str:
    try:
        return version("pdserve")
    except PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
