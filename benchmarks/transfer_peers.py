"""Bytes between two processes of one host: our transports beside memcpy, NIXL and Mooncake; alone, and while an engine decodes.

`python -m benchmarks.transfer_peers [--full]`. 256 MB as 64 messages of 4 MB; every round gives each contender its turn. NIXL and
Mooncake take part where `make peers-setup` put them under build/.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.command import benchmark_parser, mode_of, publish
from benchmarks.decode_load import BATCH, THREADS
from benchmarks.peer_process import PEERS, ROOT, peer_python
from benchmarks.report import Measurement, Mode, Result, compare, measure, result
from benchmarks.transfer import memcpy_gb_s
from benchmarks.transfer_child import MESSAGE_BYTES, MESSAGES, TOTAL_BYTES
from kv_transfer.arena import Arena, ArenaShape
from kv_transfer.transports.ucx_profiles import PROFILES

NIXL = ROOT / "build" / "nixl"
GB = TOTAL_BYTES / 1e9
ROUNDS: Mapping[Mode, int] = {"quick": 7, "full": 25}
ANSWER_S = 60.0
NOTES = (
    "ratio of the contender to the one named, above 1 = better; memcpy runs in every round in a process of its own memory",
    "CPU: both processes of a contender, which poll while bytes move, in steps of 10 ms; memcpy's is that of its one process",
    "NIXL: one request of 64 descriptors, memory registered before; as 'NIXL driver' behind our contract, a message at a time",
    "our transports without the hand-off's protocol and checksums, as the peers have none",
    "over tcp: UCX_TLS=tcp and the same UCX settings (our profile tcp) on both sides, for NIXL too; a socket for each network device "
    "of the host with NIXL (two where there is one beside the loopback), four with ours, as the drivers have it by default",
    "tcp: our transport of plain sockets, two and their threads, which profile tcp takes by itself",
)


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    command: tuple[str | Path, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


class Running:
    """A contender's process; each transfer has a deadline, past which it is killed."""

    def __init__(self, contender: Contender, log: Path) -> None:
        self._log = log
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "NIXL_LOG_LEVEL": "ERROR", **contender.environment}
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                contender.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=ROOT,
            )

    def line(self) -> str:
        assert self._process.stdout is not None
        watchdog = threading.Timer(ANSWER_S, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise RuntimeError(f"a contender ended or took too long:\n{self._log.read_text(errors='replace')[-2000:]}")
        return line.decode().strip()

    def ask(self) -> list[float]:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return [float(word) for word in self.line().split()]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True, slots=True)
class Samples:
    gb_s: list[float] = field(default_factory=list)
    cpu_s_per_gb: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)  # of the engine beside it


def contenders() -> Iterator[Contender]:
    """Those that are installed, ours first."""
    ours = (sys.executable, "-m", "benchmarks.our_transfer")
    has_nixl = (NIXL / "nixl").is_dir()
    beside_nixl = {"PYTHONPATH": f"{NIXL}:{ROOT}"}
    yield Contender("ucx", (*ours, "ucx", "host"))
    yield Contender("tcp", (*ours, "tcp", "host"))
    if has_nixl:
        yield Contender("NIXL driver", (*ours, "nixl", "host"), beside_nixl)
        for operation in ("READ", "WRITE"):
            yield Contender(
                f"NIXL {operation}", (sys.executable, "-m", "benchmarks.nixl_transfer", operation), beside_nixl
            )
    yield Contender("ucx over tcp", (*ours, "ucx", "tcp"))
    if has_nixl:
        for operation in ("READ", "WRITE"):
            command = (sys.executable, "-m", "benchmarks.nixl_transfer", operation)
            yield Contender(f"NIXL {operation} over tcp", command, {**beside_nixl, **PROFILES["tcp"]})
    if peer_python("mooncake").is_file():
        library = {"LD_LIBRARY_PATH": str(PEERS / "mooncake" / "lib")}
        yield Contender("Mooncake over tcp", (peer_python("mooncake"), "-m", "benchmarks.mooncake_transfer"), library)


class Memcpy:
    def __init__(self) -> None:
        buffers = Arena.anonymous(ArenaShape(2, MESSAGES, MESSAGE_BYTES))
        buffers.prefault()
        self._from, self._to = buffers.blocks(0, 0, MESSAGES), buffers.blocks(1, 0, MESSAGES)
        self._to[:] = self._from

    def round(self, samples: Samples) -> None:
        before = os.times()
        samples.gb_s.append(memcpy_gb_s(self._to, self._from))
        after = os.times()
        samples.cpu_s_per_gb.append((after.user + after.system - before.user - before.system) / GB)


@contextmanager
def decoding(folder: Path) -> Iterator[Running]:
    load = Running(
        Contender("engine", (sys.executable, "-m", "benchmarks.decode_load", folder / "model")), folder / "load.log"
    )
    try:
        load.ask()
        yield load
    finally:
        load.close()


def rounds(running: Mapping[str, Running], memcpy: Memcpy, count: int, load: Running | None) -> dict[str, Samples]:
    """One entry per contender, and "memcpy"; with `load`, its steps during each transfer and, as "nothing", during none."""
    taken = {name: Samples() for name in ("memcpy", "nothing", *running)}
    names = deque(running)
    for _ in range(count):
        memcpy.round(taken["memcpy"])
        names.rotate()  # nobody always comes after the same neighbour
        for name in names:
            contender = running[name]
            if load is not None:
                load.ask()
            seconds, cpu_s = contender.ask()
            taken[name].gb_s.append(GB / seconds)
            taken[name].cpu_s_per_gb.append(cpu_s / GB)
            if load is not None:
                taken[name].step_ms.extend(load.ask())
        if load is not None:
            taken["nothing"].step_ms.extend(load.ask() + load.ask())
    return taken


def figures(case: str, taken: Mapping[str, Samples]) -> Iterator[Measurement]:
    """Each against memcpy, then ours against the peers it has."""
    memcpy = taken["memcpy"]
    yield measure(f"{case}: memcpy, CPU", "s/GB", memcpy.cpu_s_per_gb)
    for name, samples in taken.items():
        if not samples.gb_s or samples is memcpy:
            continue
        yield compare(f"{case}: {name}", "GB/s", samples.gb_s, ("memcpy", memcpy.gb_s), "higher")
        yield measure(f"{case}: {name}, CPU", "s/GB", samples.cpu_s_per_gb)
        if samples.step_ms:
            idle = ("decode step without a transfer", taken["nothing"].step_ms)
            yield compare(f"{case}: {name}, decode step meanwhile", "ms", samples.step_ms, idle, "lower")
    yield from against(case, taken, "ucx", ("NIXL READ", "NIXL WRITE", "NIXL driver"))
    for ours in ("tcp", "ucx over tcp"):
        yield from against(case, taken, ours, ("NIXL READ over tcp", "NIXL WRITE over tcp", "Mooncake over tcp"))


def against(case: str, taken: Mapping[str, Samples], ours: str, peers: Sequence[str]) -> Iterator[Measurement]:
    for peer in peers:
        if peer in taken:
            yield compare(f"{case}: {ours} / {peer}", "GB/s", taken[ours].gb_s, (peer, taken[peer].gb_s), "higher")


def run(mode: Mode) -> Result:
    taking_part = list(contenders())
    memcpy = Memcpy()
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as place, ExitStack() as stack:
        folder = Path(place)
        running: dict[str, Running] = {}
        for index, contender in enumerate(taking_part):
            running[contender.name] = Running(contender, folder / f"{index}.log")
            stack.callback(running[contender.name].close)
        for waiting in running.values():
            waiting.line()
        measurements = list(figures("alone", rounds(running, memcpy, ROUNDS[mode], None)))
        with decoding(folder) as load:
            measurements += figures("while decoding", rounds(running, memcpy, ROUNDS[mode], load))
    settings: dict[str, str | int | float | bool] = {
        "decode": f"batch {BATCH}, {THREADS} threads, fp32",
        "in_flight": 16,
    }
    missing = [name for name in ("NIXL", "Mooncake") if not any(name in known.name for known in taking_part)]
    notes = (*NOTES, *(f"{name} did not take part: not installed (make peers-setup)" for name in missing))
    return result("transfer_peers", mode, settings, measurements, notes=notes)


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("KV bytes between two processes, beside NIXL and Mooncake.")
    given = parser.parse_args(arguments)
    publish(run(mode_of(given)))


if __name__ == "__main__":
    main()
