"""Owns `pdserve down`: ends the local cluster and makes sure that nothing of it is left."""

from __future__ import annotations

import argparse
import fcntl
import signal
import subprocess
from pathlib import Path

from pdserve.cli.cluster_state import ClusterState, next_command, read_state
from pdserve.cli.options import EXIT_FAILED, EXIT_OK, Commands, command
from pdserve.cli.terminal import Terminal
from pdserve.local_process import LocalProcess, children_of, end_all, local_process, wait_gone

GRACE_S = 40.0
SILENT_S = 2.0  # of a drain, before it is told
KILL_S = 10.0


def add(commands: Commands) -> None:
    parser = command(commands, "down", "end the cluster of this machine; running requests are drained", down)
    parser.add_argument("--timeout", type=float, default=GRACE_S, metavar="S", help="longest drain, then it is killed")
    parser.add_argument("--now", action="store_true", help="do not drain")


def down(options: argparse.Namespace, terminal: Terminal) -> int:
    state = read_state(options.state_dir)
    if state is None:
        terminal.say(
            f"No cluster runs in {options.state_dir}. Start one with: {next_command('up --detach', options.state_dir)}"
        )
        terminal.result({"stopped": [], "left_over": []})
        return EXIT_OK
    everything = processes_of(state)
    state.supervisor.send(signal.SIGTERM)
    if not options.now and wait_gone([state.supervisor], min(SILENT_S, options.timeout)):
        how = next_command("down --now", options.state_dir)
        terminal.progress(
            "info", "draining", f"running requests may end, {options.timeout:.0f} s at most; at once: {how}"
        )
    left = _end(state.supervisor, everything, 0.0 if options.now else options.timeout)
    _forget(options.state_dir)
    if left:
        terminal.error("left_over", f"These processes did not end: {', '.join(str(one.pid) for one in left)}")
    else:
        terminal.say(f"Stopped {len(everything)} processes; nothing is left over.")
    terminal.result({"stopped": [one.pid for one in everything], "left_over": [one.pid for one in left]})
    return EXIT_FAILED if left else EXIT_OK


def end_cluster(state_dir: Path, supervisor: subprocess.Popen[bytes], grace_s: float) -> list[int]:
    """Waits for a supervisor that was told to stop, kills what does not; pids that are left. For `up`, its parent."""
    state = read_state(state_dir)
    everything = processes_of(state) if state is not None else [local_process(supervisor.pid)]
    left = _end(everything[0], everything, grace_s)
    supervisor.wait(KILL_S)
    _forget(state_dir)
    return [one.pid for one in left]


def processes_of(state: ClusterState) -> list[LocalProcess]:
    """Supervisor first, its children, and their children: the workers' engine processes."""
    known = state.pids()
    return [*known, *children_of(known[1:])]


def _end(supervisor: LocalProcess, everything: list[LocalProcess], grace_s: float) -> list[LocalProcess]:
    """The supervisor was asked once. Returns what survives even SIGKILL."""
    if wait_gone([supervisor], grace_s):
        supervisor.send(signal.SIGTERM)  # the second one kills its children
        wait_gone([supervisor], KILL_S)
    # Whatever lives on now was not reached by its supervisor.
    return end_all(wait_gone(everything, 2.0), KILL_S)


def _forget(state_dir: Path) -> None:
    """Removes the addresses of a cluster that has ended, unless another has begun there."""
    with (state_dir / "supervisor.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        for name in ("cluster.json", "controller.json"):
            (state_dir / name).unlink(missing_ok=True)
