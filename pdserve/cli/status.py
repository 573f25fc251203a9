"""Owns `pdserve status`: the cluster, its workers, its processes."""

from __future__ import annotations

import argparse

from pdserve.cli.access import get
from pdserve.cli.cluster_state import ClusterState, read_state
from pdserve.cli.options import EXIT_NOT_READY, EXIT_OK, Commands, access, command, reaching
from pdserve.cli.record import Record
from pdserve.cli.terminal import Terminal, size
from pdserve.errors import Unavailable

CONTROLLER = "controller"  # as its supervisor names it
HEADINGS = (
    "WORKER",
    "ROLES",
    "STATE",
    "PID",
    "ENGINE",
    "BLOCKS FREE",
    "RUNNING",
    "WAITING",
    "STEP",
    "RESIDENT",
    "ADDRESS",
)


def add(commands: Commands) -> None:
    reaching(command(commands, "status", "show the cluster and its workers", status))


def status(options: argparse.Namespace, terminal: Terminal) -> int:
    """Exit status 3 where no worker can take work."""
    state = None if options.url else read_state(options.state_dir)
    with access(options).http(timeout_s=10.0) as http:
        try:
            answer = get(http, "/api/v1/status")
        except Unavailable as error:
            raise _silence(state, error) from error
    processes = _processes(state) if state is not None else []
    terminal.result({**answer.plain(), "processes": processes})
    show(answer, terminal)
    for row in processes:
        if not row["pid"]:
            terminal.line("warn", str(row["name"]), f"restarts after exit status {row['last_exit']}, see {row['log']}")
    ready = any(row.text("state") == "READY" for row in answer.records("workers"))
    return EXIT_OK if ready else EXIT_NOT_READY


def _silence(state: ClusterState | None, error: Unavailable) -> Unavailable:
    """Why a local controller does not answer, as far as its supervisor knows."""
    row = next((row for row in state.processes if row.name == CONTROLLER), None) if state is not None else None
    if row is None:
        return error
    died = f", which died with status {row.last_exit}," if row.last_exit is not None else ""
    return Unavailable(f"The controller{died} is starting. Try again in a moment; its log: {row.log}")


def show(answer: Record, terminal: Terminal) -> None:
    """Header and table."""
    terminal.say(
        f"{answer.text('model')} at {answer.text('api_url')}, gRPC {answer.text('grpc_address')}, "
        f"version {answer.text('version')}, up {answer.number('uptime_s'):.0f} s"
    )
    terminal.say(f"{answer.integer('live_requests')} requests live, {answer.integer('queued')} queued")
    _show_blends(answer.record("kv_blend"), terminal)
    terminal.table(HEADINGS, [_row(row) for row in answer.records("workers")])


def _show_blends(blends: Record, terminal: Terminal) -> None:
    """Silent where blends are off."""
    if blends.text("setting") == "off":
        return
    verdicts = [_verdict(row.record("findings")) for row in blends.records("verdicts")]
    told = "; ".join(verdicts) or "pdserve verify --blend has no verdict on this model"
    terminal.say(f"kv_blend is {blends.text('setting')}: {told}")


def _verdict(found: Record) -> str:
    epic = found.text("method") == "epic"
    recipe = f"first_tokens {found.integer('first_tokens')}" if epic else f"ratio {found.number('ratio'):g}"
    outcome = f"failed ({'; '.join(failures)})" if (failures := found.texts("failures")) else "passed"
    figures = found.record("figures")
    return (
        f"{found.text('method')} {outcome} with {recipe} on {found.integer('blended_prompts')} prompts, mean KL "
        f"{figures.number('mean_kl_nats'):.1e} nats, top-1 agreement {figures.number('top1_agreement'):.1%}"
    )


def _row(row: Record) -> tuple[str, ...]:
    leaked = row.integer("blocks_leaked")
    return (
        row.text("id"),
        "+".join(row.texts("roles")),
        row.text("state") + (" (stalled)" if row.truth("stalled") else ""),
        str(row.integer("pid")),
        str(row.integer("engine_pid")),
        f"{row.integer('blocks_free')}/{row.integer('blocks_total')}" + (f" ({leaked} leaked)" if leaked else ""),
        str(row.integer("running")),
        str(row.integer("waiting")),
        f"{row.number('step_ms'):.1f} ms",
        size(row.integer("resident_bytes")),
        row.text("address"),
    )


def _processes(state: ClusterState) -> list[dict[str, object]]:
    return [
        {
            "name": row.name,
            "pid": row.process.pid if row.process is not None else 0,
            "restarts": row.restarts,
            "last_exit": row.last_exit,
            "log": str(row.log),
        }
        for row in state.processes
    ]
