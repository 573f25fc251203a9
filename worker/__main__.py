"""Owns the entry point of a worker: `python -m worker --config FILE --id p0 --roles prefill,decode [--set a.b=c]`."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence

import uvloop

from decode_worker.service import DecodeService
from kv_store.open_store import StorePlace, open_store
from pdserve.errors import ConfigInvalid, PdserveError
from pdserve.installed_version import installed_version
from prefill_worker.service import PrefillService
from service_kit.config import ClusterConfig
from service_kit.config_file import load_config
from service_kit.core_binding import Cores, bind_engines, listed_cores, openmp_environment
from service_kit.core_claims import allowed_cores, machine_cores, own_service_cores
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
from worker_runtime.engine_link import ProcessEngineLink
from worker_runtime.grpc_endpoint import check_worker_exposure
from worker_runtime.holding import RoleName
from worker_runtime.node_settings import NodeSettings, new_incarnation
from worker_runtime.page_tiers import OpenStore
from worker_runtime.worker_node import WorkerNode

ENGINE_MODULE = "worker.engine_main"
REDIS_PASSWORD = "PDSERVE_REDIS_PASSWORD"

ROLES: dict[str, RoleName] = {"prefill": "prefill", "decode": "decode"}

log = get_logger(__name__)


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.parent_pid:
        die_with_parent(options.parent_pid)
    try:
        config = load_config(options.config, options.set)
        check_worker_exposure(config)
        roles = _roles(options.roles)
        cores = _cores(config)
    except ConfigInvalid as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_CONFIG
    configure_logs(config.log, options.id)
    settings = NodeSettings(options.id, roles, config, installed_version(), new_incarnation())
    return uvloop.run(_serve(settings, options.engine_module, cores))


async def _serve(settings: NodeSettings, engine_module: str, cores: Cores) -> int:
    config = settings.config
    signals = StopSignals()
    try:
        starting = asyncio.create_task(_open(settings, engine_module, cores))
        waited: list[asyncio.Future[WorkerNode] | asyncio.Future[None]] = [starting, signals.asked]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait([starting])
            return EXIT_DRAINED
        node = starting.result()
        try:
            return await _supervise(node, signals, config.worker.drain_s)
        finally:
            await node.close()
    except PdserveError as error:
        log.error("worker_failed", reason=error.reason, message=error.message)
        return EXIT_CONFIG if isinstance(error, ConfigInvalid) else EXIT_FAILED
    except Exception as error:
        log.exception("worker_failed", error)
        return EXIT_FAILED


async def _open(settings: NodeSettings, engine_module: str, cores: Cores) -> WorkerNode:
    config = settings.config
    command = (sys.executable, "-m", engine_module)
    service = own_service_cores(config.pool.service_cores)
    frame = config.model_dump_json().encode()
    link = await ProcessEngineLink.start(
        frame, config.worker.engine_start_s, command, openmp_environment(cores, os.environ)
    )
    try:
        keep_to_cores(service)  # not before: the engine would inherit it
        roles = (PrefillService, DecodeService)
        return await WorkerNode.open(settings, link, roles, open_store=_store_opener(settings))
    except BaseException:
        await link.close()
        raise


def _store_opener(settings: NodeSettings) -> OpenStore | None:
    config = settings.config
    if not config.store.host_bytes:
        return None
    root = config.store.disk_dir or config.state_dir / "kv"
    place = StorePlace(root / settings.worker_id, os.environ.get(REDIS_PASSWORD, ""))
    return lambda page_format, news: open_store(config.store, place, page_format, news.listener)


async def _supervise(node: WorkerNode, signals: StopSignals, drain_s: float) -> int:
    """Until the node has drained or the second signal came. Raises what the node's run raises."""
    set_apart()
    running = asyncio.create_task(node.run())
    await asyncio.wait([running, signals.asked], return_when=asyncio.FIRST_COMPLETED)
    if signals.asked.done():
        node.drain(drain_s)
    await asyncio.wait([running, signals.twice], return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        running.result()
        return EXIT_DRAINED
    running.cancel()
    await asyncio.wait([running])
    return EXIT_STOPPED_TWICE


def _parser() -> argparse.ArgumentParser:
    parser = option_parser("worker", "One worker of a pdserve cluster.", os.getppid())
    parser.add_argument("--id", required=True, help="name of this worker, unique in the cluster")
    parser.add_argument("--roles", required=True, help="prefill, decode or prefill,decode")
    parser.add_argument(
        "--engine-module", default=ENGINE_MODULE, metavar="MODULE", help="module that runs as the engine process"
    )
    return parser


def _roles(text: str) -> frozenset[RoleName]:
    names = text.split(",")
    unknown = [name for name in names if name not in ROLES]
    if unknown:
        raise ConfigInvalid(f"--roles {text}: {unknown[0]!r} is no role; known are {', '.join(ROLES)}.")
    return frozenset(ROLES[name] for name in names)


def _cores(config: ClusterConfig) -> Cores:
    """What the threads of this worker's engine are bound to. Only who starts all the workers can divide the cores: see auto."""
    if not listed_cores(config.engine.cores):
        return ()
    return bind_engines(config.engine, 1, machine_cores(frozenset(allowed_cores()))).cores[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
