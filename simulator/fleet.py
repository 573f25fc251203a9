"""Owns a fleet: many workers with modelled engines in one process, `python -m simulator.fleet --controllers HOST:PORT …`.

Each is a whole worker_runtime.worker_node.WorkerNode with real gRPC and a KV endpoint; only the engine is modelled. A test and
benchmark tool, never a product path.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import uvloop

from decode_worker.service import DecodeService
from engine.model_spec import ModelSpec
from kv_transfer.transport import Transport
from kv_transfer.transports import open_transport
from pdserve.errors import WorkerLost
from prefill_worker.service import PrefillService
from service_kit.config import ClusterConfig
from service_kit.config_file import load_config
from simulator.cost_model import PRESETS
from simulator.fleet_processes import run_parts
from simulator.inline_link import InlineEngineLink
from simulator.modelled_engine import LAYOUT, ModelledConfig
from simulator.token_draw import Vocabulary
from worker_runtime.holding import RoleName
from worker_runtime.node_settings import NodeSettings, new_incarnation
from worker_runtime.worker_node import WorkerNode

VERSION = "modelled"
_ROLES: tuple[tuple[str, frozenset[RoleName]], ...] = (
    ("p", frozenset({"prefill"})),
    ("d", frozenset({"decode"})),
    ("b", frozenset({"prefill", "decode"})),
)


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """What one process hosts."""

    prefill: int
    decode: int
    both: int
    engine: ModelledConfig
    transport: str = "inproc"  # within one process; "tcp" between several
    prefix: str = ""  # of worker ids

    def workers(self) -> Iterator[tuple[str, frozenset[RoleName]]]:
        for (letter, roles), count in zip(_ROLES, (self.prefill, self.decode, self.both), strict=True):
            for number in range(count):
                yield f"{self.prefix}{letter}{number}", roles


class Fleet:
    """`open`, then `run` until cancelled or until a worker is gone, then `close`."""

    def __init__(self, nodes: Sequence[WorkerNode]) -> None:
        self.nodes = tuple(nodes)

    @classmethod
    async def open(cls, settings: FleetSettings, config: ClusterConfig) -> Fleet:
        fleet = cls(())
        try:
            for worker_id, roles in settings.workers():
                node = await _open_node(worker_id, roles, settings, config)
                fleet.nodes = (*fleet.nodes, node)
        except BaseException:
            await fleet.close()
            raise
        return fleet

    async def run(self) -> None:
        """Every node until it is drained; a modelled engine that is gone is an error of this tool."""
        try:
            async with asyncio.TaskGroup() as group:
                for node in self.nodes:
                    group.create_task(node.run())
        except* WorkerLost as lost:
            raise lost.exceptions[0] from None

    async def close(self) -> None:
        await asyncio.gather(*(node.close() for node in self.nodes))


async def _open_node(
    worker_id: str, roles: frozenset[RoleName], settings: FleetSettings, config: ClusterConfig
) -> WorkerNode:
    node = NodeSettings(worker_id, roles, config, VERSION, new_incarnation())
    transports: dict[str, Transport] = {
        settings.transport: open_transport(settings.transport, config.transfer, config.worker.host)
    }
    link = InlineEngineLink(settings.engine)
    return await WorkerNode.open(node, link, (PrefillService, DecodeService), transports=transports)


def modelled_config(config: ClusterConfig, cost: str, speed: float, blocks: int) -> ModelledConfig:
    """An engine that passes for the cluster's model: its name, vocabulary, end tokens and context."""
    spec = ModelSpec.load(Path(config.model.path))
    first_id = max((*spec.eos_token_ids, 15)) + 1
    return ModelledConfig(
        model=config.model.served_name or Path(config.model.path).name,
        cost=replace(PRESETS[cost], speed=speed),
        vocabulary=Vocabulary(spec.vocab, first_id, spec.eos_token_ids),
        layout=msgspec.structs.replace(LAYOUT, blocks=blocks),
        max_context_tokens=config.model.max_context_tokens or spec.context_tokens,
    )


async def host(settings: FleetSettings, config: ClusterConfig, *, until_stdin_ends: bool) -> None:
    """Opens the fleet and runs it until SIGTERM, SIGINT or, where asked for, the end of stdin."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    if until_stdin_ends:
        loop.add_reader(sys.stdin, lambda: stopped.set() if not os.read(sys.stdin.fileno(), 4096) else None)
    fleet = await Fleet.open(settings, config)
    running = asyncio.create_task(fleet.run(), name="fleet")
    stopping = asyncio.create_task(stopped.wait(), name="fleet-stop")
    await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
    running.cancel()
    stopping.cancel()
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await running
    finally:
        await fleet.close()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m simulator.fleet", description="Workers with modelled engines.")
    made.add_argument("--controllers", required=True, help="gRPC addresses, HOST:PORT, comma-separated")
    made.add_argument("--config", type=Path, help="the cluster's configuration, for its model and timings")
    made.add_argument("--prefill", type=int, default=0, metavar="N", help="workers with the prefill role")
    made.add_argument("--decode", type=int, default=0, metavar="M", help="workers with the decode role")
    made.add_argument("--both", type=int, default=0, metavar="K", help="workers with both roles")
    made.add_argument("--cost", choices=sorted(PRESETS), default="h100-llama2-70b-tp4", help="how long steps take")
    made.add_argument("--speed", type=float, default=1.0, help="divides all modelled times")
    made.add_argument("--blocks", type=int, default=LAYOUT.blocks, help="KV blocks of each worker")
    made.add_argument("--processes", type=int, default=1, help="processes that share the workers")
    made.add_argument("--part", type=int, default=-1, help=argparse.SUPPRESS)  # which of the processes this one is
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    if given.speed <= 0 or given.processes < 1 or given.prefill + given.decode + given.both < 1:
        parser().error("--speed and --processes must be positive, and there must be at least one worker")
    if given.processes > 1 and given.part < 0:
        return run_parts(list(arguments if arguments is not None else sys.argv[1:]), given.processes)
    part = max(given.part, 0)
    config = load_config(given.config).model_copy(update={"controllers": tuple(given.controllers.split(","))})
    prefill, decode, both = (share(count, given.processes, part) for count in (given.prefill, given.decode, given.both))
    settings = FleetSettings(
        prefill,
        decode,
        both,
        engine=modelled_config(config, given.cost, given.speed, given.blocks),
        transport=transport_for(config, given.processes),
        prefix=f"f{part}-" if given.processes > 1 else "",
    )
    try:
        uvloop.run(host(settings, config, until_stdin_ends=given.part >= 0))
    except WorkerLost as lost:
        print(f"a modelled worker is gone: {lost}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def transport_for(config: ClusterConfig, processes: int) -> str:
    """What the configuration names; "auto" is the cheapest that reaches every worker of the fleet."""
    if config.transfer.transport != "auto":
        return config.transfer.transport
    return "tcp" if processes > 1 else "inproc"


def share(count: int, parts: int, part: int) -> int:
    """How many of `count` fall to `part` of `parts`; the shares differ by one at most."""
    return count // parts + (part < count % parts)


if __name__ == "__main__":
    sys.exit(main())
