"""Owns `pdserve up`: preflight, start, progress, one real answered request, how to go on."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pdserve.cli.access import Access, get
from pdserve.cli.cluster_state import ClusterState, next_command, running_state
from pdserve.cli.down import end_cluster
from pdserve.cli.first_answer import FirstAnswer, first_answer
from pdserve.cli.options import EXIT_NOT_READY, EXIT_OK, Commands, command
from pdserve.cli.preflight import preflight
from pdserve.cli.record import Record
from pdserve.cli.servers import fetch_model, read_config, require_servers, start_supervisor
from pdserve.cli.snippets import python_snippet, shell_snippet
from pdserve.cli.startup import Startup, already_running
from pdserve.cli.terminal import Terminal, seconds
from pdserve.errors import PdserveError, Unavailable

START_MARGIN_S = 60.0  # beyond the engine's own deadline
LOOK_S = 0.2  # between looks for a signal, in the foreground
POOLS = ("prefill", "decode", "both")


def add(commands: Commands) -> None:
    parser = command(commands, "up", "start a cluster on this machine", up)
    for pool, text in zip(POOLS, ("that prefill", "that decode", "with both roles"), strict=True):
        parser.add_argument(f"--{pool}", type=_count, metavar="N", help=f"workers {text}")
    parser.add_argument("--model", metavar="DIR_OR_HUB_ID", help="checkpoint (default: the model of the repository)")
    parser.add_argument("--port", type=int, metavar="P", help="HTTP port; 0 = a free one (default 8000)")
    parser.add_argument("--transport", choices=("auto", "ucx", "nixl", "tcp"), help="how KV travels")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML configuration, see docs/config.md")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one setting; repeatable")
    parser.add_argument(
        "--insecure", action="store_true", help="allow other addresses than loopback without TLS and key"
    )
    life = parser.add_mutually_exclusive_group()
    life.add_argument("--detach", action="store_true", help="leave the cluster running and return")
    life.add_argument("--while-stdin", action="store_true", help="end the cluster at the end of standard input")


def up(options: argparse.Namespace, terminal: Terminal) -> int:
    require_servers()
    running = already_running(options.state_dir)
    if running is not None:
        return _say_running(options.state_dir, running, terminal)
    sets = _sets(options)
    config = read_config(options.config, sets)
    model = config.record("model").text("path")
    if not Path(model).is_dir() and "/" in model and not model.startswith((".", "/", "~")):
        terminal.progress("info", "model", f"fetching {model}")
        sets += [f"model.path={fetch_model(model)}", f"model.served_name={_served_name(config, model)}"]
        config = read_config(options.config, sets)
    if not _checked(config, terminal):
        return EXIT_NOT_READY
    return _start(options, sets, config, terminal)


def _start(options: argparse.Namespace, sets: list[str], config: Record, terminal: Terminal) -> int:
    log = options.state_dir / "logs" / "supervisor.log"
    supervisor = start_supervisor(options.config, sets, log, tied=not options.detach)
    with _asked_to_stop(supervisor) as asked:
        if options.while_stdin:
            threading.Thread(target=_terminate_at_end_of_stdin, daemon=True).start()
        try:
            deadline_s = config.record("worker").number("engine_start_s") + START_MARGIN_S
            startup = Startup(options.state_dir, supervisor, terminal, _workers(config))
            access = startup.wait(deadline_s)
            answer = first_answer(access)
        except BaseException as error:
            return _give_up(options.state_dir, supervisor, error, asked, terminal)
        _tell(options, access, answer, startup, terminal)
        if options.detach:
            return EXIT_OK
        return _stay(supervisor, asked, terminal)


def _give_up(
    state_dir: Path, supervisor: subprocess.Popen[bytes], error: BaseException, asked: list[int], terminal: Terminal
) -> int:
    """Ends what was started, then tells why; Ctrl-C is no error."""
    if not asked:
        supervisor.terminate()
    left = end_cluster(state_dir, supervisor, grace_s=10.0)
    if left:
        terminal.progress("fail", "left over", f"processes {', '.join(map(str, left))}")
    if asked:
        terminal.progress("ok", "stopped", "nothing left over")
        return EXIT_NOT_READY
    raise error


def _stay(supervisor: subprocess.Popen[bytes], asked: list[int], terminal: Terminal) -> int:
    """Foreground: until Ctrl-C, or until the supervisor ends. asked: the signals that came, added to by their handler."""
    told = 0
    while (code := _exit_status(supervisor, LOOK_S)) is None:
        if len(asked) > told:
            terminal.progress(
                "info", "stopping", "at once" if told else "running requests may end; Ctrl-C stops at once"
            )
            told = len(asked)
    if code != 0:
        raise Unavailable(f"The supervisor ended with status {code}. See its log, then: pdserve up")
    terminal.progress("ok", "stopped", "nothing left over")
    return EXIT_OK


def _exit_status(supervisor: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    try:
        return supervisor.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None


@contextmanager
def _asked_to_stop(supervisor: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Passes Ctrl-C and SIGTERM on to the supervisor: the first drains, the second stops. Yields the signals that came."""
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if supervisor.poll() is None:
            supervisor.terminate()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate_at_end_of_stdin() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        continue
    os.kill(os.getpid(), signal.SIGTERM)  # as if somebody had asked: the main thread passes it on


def _checked(config: Record, terminal: Terminal) -> bool:
    checks = preflight(config)
    for check in checks:
        terminal.progress(check.mark, check.name, check.text + (f". {check.remedy}" if check.remedy else ""))
    failed = [check for check in checks if check.mark == "fail"]
    if failed:
        terminal.error("not_ready", f"{failed[0].name}: {failed[0].text}. {failed[0].remedy}")
    return not failed


def _tell(
    options: argparse.Namespace, access: Access, answer: FirstAnswer, startup: Startup, terminal: Terminal
) -> None:
    total_s = time.monotonic() - startup.began_s
    terminal.progress("ok", "answer", f"{seconds(answer.total_s):>7}  {answer.path}")
    terminal.say()
    terminal.say(_indented(f"{answer.text.rstrip()}"))
    terminal.say()
    terminal.say(
        f"  {answer.model} is served at {access.api_url} (gRPC {access.grpc_address}), {total_s:.1f} s after start"
    )
    terminal.say()
    terminal.say(_indented(shell_snippet(access, answer.model)))
    terminal.say()
    terminal.say(_indented(python_snippet(access, answer.model)))
    terminal.say()
    stop, chat = (next_command(name, options.state_dir) for name in ("down", "chat"))
    terminal.say(f"  Talk to it: {chat}. Logs: {options.state_dir / 'logs'}")
    terminal.say(f"  Stop it: {stop if options.detach else 'Ctrl-C (drains; twice stops at once)'}")
    terminal.result(_result(running_state(options.state_dir), options.state_dir, answer, startup, total_s))


def _result(
    state: ClusterState, state_dir: Path, answer: FirstAnswer, startup: Startup, total_s: float
) -> Mapping[str, object]:
    return {
        "api_url": state.api_url,
        "grpc_address": state.grpc_address,
        "state_dir": str(state_dir.absolute()),
        "supervisor_pid": state.supervisor.pid,
        "model": answer.model,
        "ready_s": {name: round(at_s, 3) for name, at_s in startup.ready_s.items()},
        "total_s": round(total_s, 3),
        "first_answer": {"request_id": answer.request_id, "text": answer.text, "path": answer.path},
    }


def _say_running(state_dir: Path, access: Access, terminal: Terminal) -> int:
    workers: list[str] = []
    try:
        with access.http(timeout_s=5.0) as http:
            workers = [row.text("id") for row in get(http, "/api/v1/status").records("workers")]
    except PdserveError as error:
        terminal.progress("warn", "api", str(error))
    terminal.say(f"A cluster runs already: {access.api_url} with {', '.join(workers) or 'no worker yet'}.")
    look, end = (next_command(name, state_dir) for name in ("status", "down"))
    terminal.say(f"Look: {look}. End it: {end}")
    terminal.result(
        {
            "already_running": True,
            "api_url": access.api_url,
            "grpc_address": access.grpc_address,
            "state_dir": str(state_dir.absolute()),
        }
    )
    return EXIT_OK


def _sets(options: argparse.Namespace) -> list[str]:
    """Flags as assignments; --set comes last and wins."""
    flags = {
        **{f"pool.{pool}": getattr(options, pool) for pool in POOLS},
        "model.path": options.model,
        "controller.port": options.port,
        "transfer.transport": options.transport,
        "security.insecure": "true" if options.insecure else None,
    }
    # `--both 2` alone means: two workers with both roles, not two besides the default pair.
    if options.both and options.prefill is None and options.decode is None:
        flags |= {"pool.prefill": 0, "pool.decode": 0}
    state_dir = [f"state_dir={options.state_dir.absolute()}"]
    return [*state_dir, *(f"{name}={value}" for name, value in flags.items() if value is not None), *options.set]


def _served_name(config: Record, hub_id: str) -> str:
    return config.record("model").text("served_name") or hub_id.rsplit("/", 1)[-1]


def _workers(config: Record) -> int:
    return sum(config.record("pool").integer(pool) for pool in POOLS)


def _count(text: str) -> int:
    count = int(text)
    if not 0 <= count <= 512:
        raise argparse.ArgumentTypeError("must lie between 0 and 512")
    return count


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
