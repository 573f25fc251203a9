"""Owns the processes of a local cluster: starts them, restarts what dies, ends them all.

`python -m service_kit.supervisor --config FILE [--set a.b=c]`. SIGTERM or SIGINT drains and stops; twice kills.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pdserve.errors import ConfigInvalid, Unavailable
from pdserve.local_process import local_process
from service_kit.api_keys import api_keys_from
from service_kit.cluster_files import ClusterFiles, ClusterRecord, ProcessRow
from service_kit.config import ClusterConfig
from service_kit.config_file import load_config
from service_kit.core_binding import CoreBinding, bind_engines, service_cores
from service_kit.core_claims import CoreClaims, allowed_cores, machine_cores, own_service_cores
from service_kit.entry_point import EXIT_CONFIG, option_parser
from service_kit.exposure import check_exposure
from service_kit.logs import configure_logs, get_logger
from service_kit.ports import choose_port
from service_kit.process import Child, ProcessSpec, die_with_parent, stop_all
from service_kit.process_table import CONTROLLER, process_table
from service_kit.restart_policy import RestartPolicy, RestartState, died, started

EXIT_RUNS_ALREADY = 3
STOP_MARGIN_S = 5.0  # beyond the drain's own deadline
CANNOT_EXECUTE = 127

log = get_logger("service_kit.supervisor")  # not __name__, which is __main__ here


class Addresses:
    """Where the controller will listen, decided before it starts, so that it comes back there."""

    def __init__(self, config: ClusterConfig) -> None:
        host, scheme = config.controller.host, "https" if config.security.tls_cert else "http"
        self.http_port = choose_port(host, config.controller.port)
        self.grpc_port = choose_port(host, config.controller.grpc_port, frozenset({self.http_port}))
        self.api_url = f"{scheme}://{host}:{self.http_port}"
        self.grpc_address = f"{host}:{self.grpc_port}"


def effective_config(config: ClusterConfig, addresses: Addresses, state_dir: Path) -> ClusterConfig:
    """What the children read: chosen ports, absolute paths."""
    ports = {"port": addresses.http_port, "grpc_port": addresses.grpc_port}
    return config.model_copy(
        update={
            "controller": config.controller.model_copy(update=ports),
            "controllers": config.controllers or (addresses.grpc_address,),
            "model": config.model.model_copy(update={"path": resolve_model(config.model.path)}),
            "state_dir": state_dir,
        }
    )


def resolve_model(path: str) -> str:
    """A directory, absolute, found from here or beside these sources; anything else is left as it is (a hub id)."""
    beside_sources = Path(__file__).resolve().parent.parent / path
    for candidate in (Path(path), beside_sources):
        if candidate.is_dir():
            return str(candidate.resolve())
    return path


class Supervisor:
    """Runs a process table until it is stopped. Every process has one task that owns it."""

    def __init__(
        self,
        table: Sequence[ProcessSpec],
        policy: RestartPolicy,
        files: ClusterFiles,
        addresses: Addresses,
        drain_s: float,
    ) -> None:
        self._table = table
        self._policy = policy
        self._files = files
        self._addresses = addresses
        self._drain_s = drain_s
        self._self = local_process(os.getpid())
        self._children: dict[str, Child] = {}
        self._rows = {spec.name: self._row(spec.name, RestartState(), None) for spec in table}
        self._stopping = asyncio.Event()
        self._killing = asyncio.Event()

    def stop(self) -> None:
        """First call: drain, then stop. Second: kill."""
        (self._killing if self._stopping.is_set() else self._stopping).set()

    async def run(self) -> None:
        """Returns when all children have ended after `stop`."""
        async with asyncio.TaskGroup() as group:
            for spec in self._table:
                group.create_task(self._keep(spec), name=spec.name)
            group.create_task(self._stop_when_asked())

    async def _keep(self, spec: ProcessSpec) -> None:
        state = RestartState()
        last_exit: int | None = None
        while not self._stopping.is_set():
            state = started(state, time.monotonic())
            last_exit = await self._live(spec, state, last_exit)
            state = died(state, self._policy, time.monotonic())
            self._show(spec.name, state, last_exit)
            if self._stopping.is_set():
                return
            delay_s = state.due_s - time.monotonic()
            log.warning("process_died", name=spec.name, exit=last_exit, restart_in_s=round(delay_s, 3))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._stopping.wait()

    async def _live(self, spec: ProcessSpec, state: RestartState, last_exit: int | None) -> int:
        """One life of a process; its exit status."""
        try:
            child = Child.start(spec, self._files.log(spec.name))
        except OSError as error:
            log.error("process_not_started", name=spec.name, error=str(error))
            return CANNOT_EXECUTE
        self._children[spec.name] = child
        log.info("process_started", name=spec.name, pid=child.identity.pid, restarts=state.restarts)
        self._show(spec.name, state, last_exit)
        code = await child.wait()
        del self._children[spec.name]
        return code

    async def _stop_when_asked(self) -> None:
        await self._stopping.wait()
        log.info("stopping")
        stopping = asyncio.ensure_future(self._stop_in_order())
        killing = asyncio.ensure_future(self._killing.wait())
        await asyncio.wait([stopping, killing], return_when=asyncio.FIRST_COMPLETED)
        killing.cancel()
        if not stopping.done():
            log.warning("killing")
            for child in self._children.values():
                child.send(signal.SIGKILL)
        await stopping

    async def _stop_in_order(self) -> None:
        """The controller first: it lets running requests end, for which it needs the workers."""
        grace_s = self._drain_s + STOP_MARGIN_S
        controllers = [child for name, child in self._children.items() if name == CONTROLLER]
        await stop_all(controllers, grace_s)
        await stop_all(list(self._children.values()), grace_s)

    def _show(self, name: str, state: RestartState, last_exit: int | None) -> None:
        self._rows[name] = self._row(name, state, last_exit)
        self._files.publish(
            ClusterRecord(
                self._self.pid,
                self._self.start_ticks,
                self._addresses.api_url,
                self._addresses.grpc_address,
                list(self._rows.values()),
            )
        )

    def _row(self, name: str, state: RestartState, last_exit: int | None) -> ProcessRow:
        child, path = self._children.get(name), str(self._files.log(name))
        if child is None:
            return ProcessRow(name, 0, 0, "WAITING", state.restarts, last_exit, path)
        identity = child.identity
        return ProcessRow(name, identity.pid, identity.start_ticks, "RUNNING", state.restarts, last_exit, path)


async def supervise(supervisor: Supervisor) -> None:
    """Runs it under this process's signals."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.stop)
    await supervisor.run()


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.parent_pid:
        die_with_parent(options.parent_pid)
    try:
        config = load_config(options.config, options.set)
        check_exposure(config, api_keys_from(os.environ))
        _bind(config, frozenset(allowed_cores()))
        own_service_cores(config.pool.service_cores)
        if options.print_config:
            sys.stdout.write(_printed(config) + "\n")
            return 0
    except ConfigInvalid as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_CONFIG
    files = ClusterFiles(config.state_dir)
    try:
        files.lock()
    except Unavailable as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_RUNS_ALREADY
    configure_logs(config.log, "supervisor")
    _run(config, files)
    return 0


def _run(config: ClusterConfig, files: ClusterFiles) -> None:
    addresses = Addresses(config)
    files.begin(effective_config(config, addresses, files.state_dir))
    pool = config.pool
    policy = RestartPolicy(pool.restart_backoff_s, pool.restart_backoff_max_s)
    claims = CoreClaims()  # held until this process ends
    binding = _bound(config, claims)
    service = service_cores(pool.service_cores, binding.cores, allowed_cores())
    table = process_table(pool, files.config, sys.executable, binding.cores, service)

    async def serve() -> None:
        await supervise(Supervisor(table, policy, files, addresses, config.worker.drain_s))

    asyncio.run(serve())
    files.end()


def _bind(config: ClusterConfig, free: frozenset[int]) -> CoreBinding:
    pool = config.pool
    return bind_engines(config.engine, pool.prefill + pool.decode + pool.both, machine_cores(free))


def _bound(config: ClusterConfig, claims: CoreClaims) -> CoreBinding:
    """Claims the cores of the engines, as far as no other cluster has them."""
    binding = _bind(config, frozenset(allowed_cores()))
    if any(binding.cores):
        binding = _bind(config, claims.take(allowed_cores()))
        claims.keep({core for own in binding.cores for core in own})
    if any(binding.cores):
        log.info("engines_bound", cores=[",".join(map(str, own)) for own in binding.cores])
    else:
        log.info("engines_not_bound", reason=binding.reason)
    return binding


def _printed(config: ClusterConfig) -> str:
    """For programs that cannot read the tree themselves: the CLI's preflight."""
    resolved = config.model.model_copy(update={"path": resolve_model(config.model.path)})
    return config.model_copy(update={"model": resolved, "state_dir": config.state_dir.absolute()}).model_dump_json()


def _parser() -> argparse.ArgumentParser:
    parser = option_parser("service_kit.supervisor", "Runs a local cluster.", parent_pid=0)
    parser.add_argument("--print-config", action="store_true", help="print the validated configuration and leave")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
