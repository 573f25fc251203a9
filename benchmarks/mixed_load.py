"""Inter-token latency of running streams while long prompts arrive, through the whole stack: controller, HTTP, real engines.

`python -m benchmarks.mixed_load [--full]`. Clusters of the shipped model, one thread per worker: one worker that cuts prompts into
chunks, one that does not, a prefill and a decode worker, and these two with a core of its own each. The solo value of each is its own
without the prompts. What the prompts add is told apart: those of one token are computed by the prefill worker alone, nothing is handed
over; those of two decode one step over their whole context. With two or more of them in a hundred steps, P99 is the time
of such a step. That step alone is one floor: the same streams while one sequence as long as those prompts decodes beside them all the
time, and no other arrives. What sharing caches and memory with one busy core can cost is told by a process that only copies memory:
beside the streams alone, and beside the streams and that sequence. It takes more of them than a prefill does, so it is no floor.
How long the decode engine waited for a core tells what the machine had to do with it.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from benchmarks.command import benchmark_parser, mode_of, publish
from benchmarks.live_cluster import live_cluster
from benchmarks.load import LoadReport
from benchmarks.memory_stream import memory_stream
from benchmarks.report import Measurement, Mode, Result, compare, measure, result

STREAMS, PROMPT, OUTPUT = 4, 64, 600
LONG_CLIENTS, LONG_PROMPT = 2, 3000
HANDED_OFF, PREFILLED_ONLY = 2, 1  # tokens of a long prompt's answer: one is not handed off
LONG_OUTPUT = 1000  # tokens of a long sequence that decodes all the time; with its prompt it fits the model's context
PREFILL_S = (
    1.5  # for such a prompt before the streams begin; what is left of it then is one arrival in thousands of steps
)
SECONDS: dict[Mode, float] = {"quick": 6.0, "full": 15.0}
ROUNDS: dict[Mode, int] = {"quick": 2, "full": 5}
START_S, SETTLE_S = 180.0, 0.5
CORES = sorted(os.sched_getaffinity(0))
PAIR = ("--prefill", "1", "--decode", "1")
CLUSTERS: dict[str, Sequence[str]] = {
    "one worker, chunks of 512": ("--both", "1", "--set", "engine.prefill_chunk=512"),
    "one worker, unchunked": ("--both", "1", "--set", "engine.prefill_chunk=0", "--set", "engine.token_budget=4096"),
    "prefill + decode workers": PAIR,
    "prefill + decode workers, a core each": (*PAIR, "--set", f"engine.cores={CORES[0]},{CORES[1 % len(CORES)]}"),
}


class _Worker(msgspec.Struct):
    roles: list[str]
    engine_pid: int


class _Status(msgspec.Struct):
    workers: list[_Worker]


@dataclass(slots=True)
class Rounds:
    """Samples of one cluster, one per round."""

    alone: list[LoadReport] = field(default_factory=list)
    beside_prefill: list[LoadReport] = field(default_factory=list)  # streams while prompts are prefilled, and no more
    beside_decode: list[LoadReport] = field(
        default_factory=list
    )  # streams while one long sequence decodes, and none arrives
    beside_memory: list[LoadReport] = field(default_factory=list)  # streams while another process copies memory
    beside_both: list[LoadReport] = field(default_factory=list)  # beside that sequence and that process
    mixed: list[LoadReport] = field(default_factory=list)  # streams while prompts are prefilled, handed off and decoded
    prompts: list[LoadReport] = field(default_factory=list)
    waited_alone: list[float] = field(default_factory=list)  # see waited_share
    waited_mixed: list[float] = field(default_factory=list)


@contextmanager
def cluster(flags: Sequence[str]) -> Iterator[str]:
    """A running cluster; yields HOST:PORT."""
    sizes = ("--prefill", "0", "--decode", "0") if "--both" in flags else ()
    with (
        tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder,
        live_cluster(Path(folder) / "state", (*sizes, *flags, "--set", "engine.threads=1")) as running,
    ):
        yield running.url.removeprefix("http://")


def load(address: str, streams: int, tokens: tuple[int, int], seconds: float, seed: int) -> subprocess.Popen[bytes]:
    """tokens: of a prompt, and of its answer. seed: another one for every load, or its prompts are found in the cache."""
    options = {
        "streams": streams,
        "prompt-tokens": tokens[0],
        "output-tokens": tokens[1],
        "seconds": seconds,
        "requests": 10**6,
        "seed": seed,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen([sys.executable, "-m", "benchmarks.load", "--url", address, *words], stdout=subprocess.PIPE)


def report_of(process: subprocess.Popen[bytes], seconds: float) -> LoadReport:
    output, _ = process.communicate(timeout=seconds + 90)
    report = msgspec.json.decode(output, type=LoadReport)
    if report.failures:
        raise RuntimeError(f"{report.failures} requests failed, the first: {report.first_failure}")
    return report


def decode_engine(address: str) -> int:
    """Pid of the engine that decodes."""
    with urllib.request.urlopen(f"http://{address}/api/v1/status", timeout=10) as answer:
        status = msgspec.json.decode(answer.read(), type=_Status)
    return next(worker.engine_pid for worker in status.workers if "decode" in worker.roles)


def core_times_ns(pid: int) -> tuple[int, int]:
    """How long the first thread of a process has run, and how long it was runnable without a core."""
    run_ns, wait_ns, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
    return int(run_ns), int(wait_ns)


def waited_share(before: tuple[int, int], after: tuple[int, int]) -> float:
    """Of the time that a thread wanted to run, the percentage without a core."""
    ran, waited = after[0] - before[0], after[1] - before[1]
    return 100 * waited / (ran + waited) if ran + waited else 0.0


def rounds(address: str, mode: Mode) -> Rounds:
    seconds, taken, engine = SECONDS[mode], Rounds(), decode_engine(address)
    seeds = itertools.count(1)

    def streams() -> subprocess.Popen[bytes]:
        return load(address, STREAMS, (PROMPT, OUTPUT), seconds, next(seeds))

    def among_prompts(answer_tokens: int) -> tuple[LoadReport, LoadReport]:
        running = streams()
        time.sleep(SETTLE_S)  # the streams decode before the prompts come
        tokens, span_s = (LONG_PROMPT, answer_tokens), seconds - 2 * SETTLE_S
        arriving = load(address, LONG_CLIENTS, tokens, span_s, next(seeds))
        return report_of(running, seconds), report_of(arriving, seconds)

    def beside_memory() -> LoadReport:
        with memory_stream():
            return report_of(streams(), seconds)

    def beside_decode(neighbour: AbstractContextManager[None]) -> LoadReport:
        decoding = load(address, 1, (LONG_PROMPT, LONG_OUTPUT), 10 * seconds, next(seeds))
        try:
            time.sleep(PREFILL_S)
            with neighbour:
                return report_of(streams(), seconds)
        finally:
            decoding.kill()
            decoding.communicate()

    for _ in range(ROUNDS[mode]):
        start = core_times_ns(engine)
        taken.alone.append(report_of(streams(), seconds))
        between = core_times_ns(engine)
        mixed, prompts = among_prompts(HANDED_OFF)
        taken.waited_alone.append(waited_share(start, between))
        taken.waited_mixed.append(waited_share(between, core_times_ns(engine)))
        taken.mixed.append(mixed)
        taken.prompts.append(prompts)
        taken.beside_decode.append(beside_decode(nullcontext()))
        taken.beside_memory.append(beside_memory())
        taken.beside_both.append(beside_decode(memory_stream()))
        taken.beside_prefill.append(among_prompts(PREFILLED_ONLY)[0])
    return taken


def measurements(name: str, address: str, mode: Mode) -> list[Measurement]:
    taken = rounds(address, mode)

    def ms(reports: Sequence[LoadReport], attribute: str) -> list[float]:
        return [float(getattr(report, attribute)) * 1e3 for report in reports]

    solo = ("the same streams alone", ms(taken.alone, "itl_p99_s"))
    middle = ("the same streams alone", ms(taken.alone, "itl_p50_s"))
    floor = ("streams beside a decoding sequence of that length", ms(taken.beside_decode, "itl_p99_s"))
    machine = ("streams beside such a sequence and a process that copies memory", ms(taken.beside_both, "itl_p99_s"))
    quiet = ("the same streams alone", taken.waited_alone)
    return [
        compare(f"{name}: ITL p99", "ms", ms(taken.mixed, "itl_p99_s"), solo, "lower"),
        compare(f"{name}: ITL p99, to what the step itself costs", "ms", ms(taken.mixed, "itl_p99_s"), floor, "lower"),
        compare(
            f"{name}: ITL p99, to that step beside a memory stream",
            "ms",
            ms(taken.mixed, "itl_p99_s"),
            machine,
            "lower",
        ),
        compare(f"{name}: ITL p99, a memory stream", "ms", ms(taken.beside_memory, "itl_p99_s"), solo, "lower"),
        compare(f"{name}: ITL p99, prompts of one token", "ms", ms(taken.beside_prefill, "itl_p99_s"), solo, "lower"),
        compare(f"{name}: decode engine without a core", "%", taken.waited_mixed, quiet, "lower"),
        compare(f"{name}: ITL p50", "ms", ms(taken.mixed, "itl_p50_s"), middle, "lower"),
        measure(f"{name}: tokens of the streams", "tok/s", [r.tokens / r.wall_s for r in taken.mixed], "higher"),
        measure(f"{name}: long prompts", "req/s", [r.requests / r.wall_s for r in taken.prompts], "higher"),
        measure(f"{name}: TTFT of a long prompt, p50", "ms", ms(taken.prompts, "ttft_p50_s")),
    ]


def run(mode: Mode) -> Result:
    measured: list[Measurement] = []
    for name, flags in CLUSTERS.items():
        with cluster(flags) as address:
            measured += measurements(name, address, mode)
    settings: dict[str, str | int | float | bool] = {
        "model": "models/pdserve-tiny, float32",
        "streams": f"{STREAMS} of {PROMPT} + {OUTPUT} tokens",
        "long_prompts": f"{LONG_CLIENTS} clients, {LONG_PROMPT} tokens each, one after the other",
        "threads_per_worker": 1,
    }
    notes = ("closed loop; the load generators share the machine's cores with the cluster",)
    return result("mixed_load", mode, settings, measured, notes=notes)


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Latency of running streams while long prompts arrive.")
    given = parser.parse_args(arguments)
    publish(run(mode_of(given)))


if __name__ == "__main__":
    main()
