"""Overhead of the controller: requests and tokens per second, added TTFT, and CPU use per process, over modelled workers.

`python -m benchmarks.controller [--full]`. One controller process, a fleet of modelled workers in two processes, one load generator
process; HTTP streaming, 512-token prompts, no shared prefix. Added TTFT = measured TTFT - the prefill time that the cost model names
for a prompt alone, so it holds queueing in the workers too, wherever several prompts meet there.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.command import benchmark_parser, mode_of, publish
from benchmarks.load import LoadReport
from benchmarks.modelled_cluster import FleetShape, ModelledCluster, modelled_cluster
from benchmarks.report import Measurement, Mode, Result, measure, result
from simulator.cost_model import PRESETS

MODEL_DIR = Path(__file__).parent.parent / "models" / "pdserve-tiny"
PROMPT_TOKENS = 512
OUTPUT_TOKENS = 64
STREAMS = (1, 64, 256)
SHAPES = {
    "fast": FleetShape(prefill=4, decode=4, cost="fast", processes=2),
    "h100": FleetShape(prefill=16, decode=16, cost="h100-llama2-70b-tp4", processes=2),
}
PREFILL_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Effort:
    requests_per_stream: int
    least_requests: int
    seconds: float
    repeats: int


EFFORTS: dict[Mode, Effort] = {"quick": Effort(2, 20, 6.0, 1), "full": Effort(6, 100, 20.0, 3)}


@dataclass(frozen=True, slots=True)
class Loaded:
    """One load and what each process spent on it."""

    report: LoadReport
    cpu_cores: dict[str, float]  # per process, CPU seconds per second


def run_load(cluster: ModelledCluster, streams: int, effort: Effort) -> Loaded:
    requests = max(effort.least_requests, streams * effort.requests_per_stream)
    command = [
        *(sys.executable, "-m", "benchmarks.load", "--url", cluster.http_address),
        *("--streams", str(streams), "--requests", str(requests), "--seconds", str(effort.seconds)),
        *("--prompt-tokens", str(PROMPT_TOKENS), "--output-tokens", str(OUTPUT_TOKENS)),
    ]
    before = {process.name: process.cpu_s() for process in cluster.processes}
    finished = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=effort.seconds + 120)
    report = msgspec.json.decode(finished.stdout, type=LoadReport)
    spent = {process.name: process.cpu_s() - before[process.name] for process in cluster.processes}
    spent["load generator"] = report.cpu_s
    return Loaded(report, {name: seconds / report.wall_s for name, seconds in spent.items()})


def figures(name: str, runs: list[Loaded], modelled_s: float) -> list[Measurement]:
    reports = [run.report for run in runs]
    rows = [
        measure(f"{name}: requests", "1/s", [r.requests / r.wall_s for r in reports], "higher"),
        measure(f"{name}: tokens", "1/s", [r.tokens / r.wall_s for r in reports], "higher"),
        measure(f"{name}: added TTFT p50", "ms", [(r.ttft_p50_s - modelled_s) * 1e3 for r in reports]),
        measure(f"{name}: added TTFT p99", "ms", [(r.ttft_p99_s - modelled_s) * 1e3 for r in reports]),
        measure(f"{name}: ITL p50", "ms", [r.itl_p50_s * 1e3 for r in reports]),
        measure(f"{name}: ITL p99", "ms", [r.itl_p99_s * 1e3 for r in reports]),
    ]
    for process in runs[0].cpu_cores:
        rows.append(measure(f"{name}: CPU of {process}", "cores", [run.cpu_cores[process] for run in runs]))
    return rows


def run(mode: Mode) -> Result:
    effort = EFFORTS[mode]
    measurements: list[Measurement] = []
    failures: list[str] = []
    for shape_name, shape in SHAPES.items():
        modelled_s = PRESETS[shape.cost].prefill_s(PROMPT_TOKENS, PREFILL_CHUNK)
        with (
            tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder,
            modelled_cluster(shape, MODEL_DIR, Path(folder)) as cluster,
        ):
            run_load(cluster, 1, EFFORTS["quick"])
            for streams in STREAMS:
                runs = [run_load(cluster, streams, effort) for _ in range(effort.repeats)]
                measurements += figures(f"{shape_name}, {streams} streams", runs, modelled_s)
                failed = sum(loaded.report.failures for loaded in runs)
                if failed:
                    first = next(loaded.report.first_failure for loaded in runs if loaded.report.failures)
                    failures.append(
                        f"{shape_name}, {streams} streams: {failed} requests failed, the first with {first}"
                    )
    settings: dict[str, str | int | float | bool] = {
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        **{name: f"{s.prefill} prefill + {s.decode} decode workers, cost {s.cost}" for name, s in SHAPES.items()},
    }
    notes = ["all processes share the machine's cores; a fleet process stands for many machines", *failures]
    return result("controller", mode, settings, measurements, notes=notes)


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Overhead of the controller over modelled workers.")
    given = parser.parse_args(arguments)
    publish(run(mode_of(given)))


if __name__ == "__main__":
    main()
