"""Owns the entry point of the controller: `python -m controller --config FILE [--set a.b=c]`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

import uvloop

from controller.controller_node import ControllerNode
from pdserve.errors import ConfigInvalid, PdserveError
from pdserve.installed_version import installed_version
from service_kit.api_keys import ApiKeys, api_keys_from
from service_kit.config import ClusterConfig
from service_kit.config_file import load_config
from service_kit.core_claims import own_service_cores
from service_kit.entry_point import (
    EXIT_CONFIG,
    EXIT_DRAINED,
    EXIT_FAILED,
    EXIT_STOPPED_TWICE,
    StopSignals,
    option_parser,
)
from service_kit.logs import configure_logs, get_logger
from service_kit.process import die_with_parent, keep_to_cores
from service_kit.start_up_objects import set_apart

log = get_logger(__name__)


def main(arguments: Sequence[str]) -> int:
    options = option_parser("controller", "The controller of a pdserve cluster.", os.getppid()).parse_args(arguments)
    if options.parent_pid:
        die_with_parent(options.parent_pid)
    try:
        config = load_config(options.config, options.set)
        keys = api_keys_from(os.environ)
        keep_to_cores(own_service_cores(config.pool.service_cores))
    except ConfigInvalid as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_CONFIG
    configure_logs(config.log, "controller")
    return uvloop.run(_serve(config, keys))


async def _serve(config: ClusterConfig, keys: ApiKeys) -> int:
    signals = StopSignals()
    try:
        node = await ControllerNode.open(config, keys, installed_version())
    except ConfigInvalid as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_CONFIG
    except PdserveError as error:
        log.error("controller_failed", reason=error.reason, message=error.message)
        return EXIT_FAILED
    try:
        return await _supervise(node, signals)
    except Exception as error:
        log.exception("controller_failed", error)
        return EXIT_FAILED
    finally:
        await node.close()


async def _supervise(node: ControllerNode, signals: StopSignals) -> int:
    """Until the node has drained or the second signal came. Raises what the node's run raises."""
    set_apart()
    running = asyncio.create_task(node.run(), name="controller")
    await asyncio.wait([running, signals.asked], return_when=asyncio.FIRST_COMPLETED)
    if not running.done():
        draining = asyncio.create_task(node.drain(), name="controller-drain")
        await asyncio.wait([running, draining, signals.twice], return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
        node.stop()
    await asyncio.wait([running, signals.twice], return_when=asyncio.FIRST_COMPLETED)
    if not running.done():
        running.cancel()
        await asyncio.wait([running])
        return EXIT_STOPPED_TWICE
    running.result()
    return EXIT_STOPPED_TWICE if signals.twice.done() else EXIT_DRAINED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
