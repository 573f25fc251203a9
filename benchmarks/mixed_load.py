"""Inter-token latency of running streams while long prompts arrive, through the whole stack: controller, HTTP, real engines.

`python -m benchmarks.mixed_load [--full]`. Three clusters of the shipped model, one thread per worker: one worker that cuts prompts
into chunks, one that does not, and a prefill and a decode worker. The solo value of each is its own without the prompts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from benchmarks.load import LoadReport
from benchmarks.report import Measurement, Mode, Result, compare, measure, result, table, write_result

STREAMS, PROMPT, OUTPUT = 4, 64, 600
LONG_CLIENTS, LONG_PROMPT, LONG_OUTPUT = 2, 3000, 2
SECONDS: dict[Mode, float] = {"quick": 6.0, "full": 15.0}
ROUNDS: dict[Mode, int] = {"quick": 1, "full": 3}
START_S, SETTLE_S = 180.0, 0.5
CLUSTERS: dict[str, Sequence[str]] = {
    "one worker, chunks of 512": ("--both", "1", "--set", "engine.prefill_chunk=512"),
    "one worker, unchunked": ("--both", "1", "--set", "engine.prefill_chunk=0", "--set", "engine.token_budget=4096"),
    "prefill + decode workers": ("--prefill", "1", "--decode", "1"),
}


@contextmanager
def cluster(flags: Sequence[str]) -> Iterator[str]:
    """A running cluster; yields HOST:PORT."""
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        place = ("--state-dir", str(Path(folder) / "state"))
        command = (str(Path(sys.executable).with_name("pdserve")),)
        sizes = ("--prefill", "0", "--decode", "0") if "--both" in flags else ()
        up = (
            *command,
            "up",
            *place,
            "--detach",
            "-o",
            "json",
            "--port",
            "0",
            *sizes,
            *flags,
            "--set",
            "engine.threads=1",
        )
        try:
            answer = subprocess.run(up, check=True, capture_output=True, text=True, timeout=START_S)
            yield str(json.loads(answer.stdout)["api_url"]).removeprefix("http://")
        finally:
            subprocess.run((*command, "down", *place), check=False, capture_output=True, timeout=START_S)


def load(address: str, streams: int, prompt: int, output: int, seconds: float) -> subprocess.Popen[bytes]:
    options = {
        "streams": streams,
        "prompt-tokens": prompt,
        "output-tokens": output,
        "seconds": seconds,
        "requests": 10**6,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen([sys.executable, "-m", "benchmarks.load", "--url", address, *words], stdout=subprocess.PIPE)


def report_of(process: subprocess.Popen[bytes], seconds: float) -> LoadReport:
    output, _ = process.communicate(timeout=seconds + 90)
    report = msgspec.json.decode(output, type=LoadReport)
    if report.failures:
        raise RuntimeError(f"{report.failures} requests failed, the first: {report.first_failure}")
    return report


def rounds(address: str, mode: Mode) -> tuple[list[LoadReport], list[LoadReport], list[LoadReport]]:
    """Reports of the streams alone, of the streams among long prompts, and of the long prompts."""
    seconds = SECONDS[mode]
    alone: list[LoadReport] = []
    mixed: list[LoadReport] = []
    prompts: list[LoadReport] = []
    for _ in range(ROUNDS[mode]):
        alone.append(report_of(load(address, STREAMS, PROMPT, OUTPUT, seconds), seconds))
        running = load(address, STREAMS, PROMPT, OUTPUT, seconds)
        time.sleep(SETTLE_S)  # the streams decode before the prompts come
        arriving = load(address, LONG_CLIENTS, LONG_PROMPT, LONG_OUTPUT, seconds - 2 * SETTLE_S)
        mixed.append(report_of(running, seconds))
        prompts.append(report_of(arriving, seconds))
    return alone, mixed, prompts


def measurements(name: str, address: str, mode: Mode) -> list[Measurement]:
    alone, mixed, prompts = rounds(address, mode)

    def ms(reports: Sequence[LoadReport], field: str) -> list[float]:
        return [float(getattr(report, field)) * 1e3 for report in reports]

    solo = ("the same streams alone", ms(alone, "itl_p99_s"))
    return [
        compare(f"{name}: ITL p99", "ms", ms(mixed, "itl_p99_s"), solo, "lower"),
        measure(f"{name}: ITL p50", "ms", ms(mixed, "itl_p50_s")),
        measure(f"{name}: tokens of the streams", "tok/s", [r.tokens / r.wall_s for r in mixed], "higher"),
        measure(f"{name}: long prompts", "req/s", [r.requests / r.wall_s for r in prompts], "higher"),
        measure(f"{name}: TTFT of a long prompt, p50", "ms", ms(prompts, "ttft_p50_s")),
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
    parser = argparse.ArgumentParser(description="Latency of running streams while long prompts arrive.")
    parser.add_argument("--full", action="store_true")
    given = parser.parse_args(arguments)
    measured = run("full" if given.full else "quick")
    write_result(measured)
    print(table(measured))


if __name__ == "__main__":
    main()
