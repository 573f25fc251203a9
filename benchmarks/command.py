"""Owns the command line of a benchmark: `python -m benchmarks.NAME [--full]`, and what it leaves behind."""

from __future__ import annotations

import argparse

from benchmarks.processes import unwind_on_sigterm
from benchmarks.report import Mode, Result, table, write_result

THREADS = 2


def benchmark_parser(description: str) -> argparse.ArgumentParser:
    """Of a process that is the benchmark: SIGTERM unwinds it from here on, so that no cluster and no folder stays behind."""
    unwind_on_sigterm()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--full", action="store_true", help="as many samples as the figures need")
    return parser


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=THREADS, help="of each engine")


def mode_of(given: argparse.Namespace) -> Mode:
    return "full" if given.full else "quick"


def publish(measured: Result) -> None:
    """Into the file of the results, and on the screen."""
    path = write_result(measured)
    print(table(measured))
    print(f"written to {path}")
