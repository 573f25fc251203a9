"""Owns the form of a benchmark's result: one JSON schema for all of them, the file it goes to, and the table on the screen."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from benchmarks.machine import Machine, describe_machine

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"

Better = Literal["lower", "higher"]
Mode = Literal["quick", "full"]


class Figure(msgspec.Struct, frozen=True):
    """Samples of one quantity, summed up."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Figure:
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))


class Peer(msgspec.Struct, frozen=True):
    """What we are compared with, measured in the same run."""

    name: str
    figure: Figure
    ratio: float  # above 1 = we are better


class Measurement(msgspec.Struct, frozen=True):
    name: str
    unit: str
    better: Better
    figure: Figure
    peer: Peer | None = None


class Result(msgspec.Struct, frozen=True):
    benchmark: str
    mode: Mode
    taken_at: str  # UTC, to the minute
    machine: Machine
    settings: dict[str, str | int | float | bool]
    measurements: tuple[Measurement, ...]
    notes: tuple[str, ...] = ()
    schema: int = SCHEMA


def measure(name: str, unit: str, samples: Sequence[float], better: Better = "lower") -> Measurement:
    return Measurement(name, unit, better, Figure.of(samples))


def compare(
    name: str, unit: str, samples: Sequence[float], peer: tuple[str, Sequence[float]], better: Better
) -> Measurement:
    """A measurement with its peer; `peer` is (name, samples of the same run)."""
    ours, theirs = Figure.of(samples), Figure.of(peer[1])
    better_one, worse_one = (theirs, ours) if better == "lower" else (ours, theirs)
    ratio = better_one.median / worse_one.median if worse_one.median else 0.0
    return Measurement(name, unit, better, ours, Peer(peer[0], theirs, round(ratio, 4)))


def percentile(samples: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile of a non-empty sequence."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def result(
    benchmark: str,
    mode: Mode,
    settings: dict[str, str | int | float | bool],
    measurements: Iterable[Measurement],
    *,
    notes: Sequence[str] = (),
    accelerator: str = "",
) -> Result:
    taken_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ")
    machine = describe_machine(accelerator)
    return Result(benchmark, mode, taken_at, machine, settings, tuple(measurements), tuple(notes))


def write_result(written: Result, folder: Path = RESULTS) -> Path:
    """Replaces the result of the same benchmark and mode."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{written.benchmark}-{written.mode}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(written), indent=1) + b"\n")
    return path


def read_result(path: Path) -> Result:
    """Raises msgspec.ValidationError for a file of another form."""
    return msgspec.json.decode(path.read_bytes(), type=Result)


def table(shown: Result) -> str:
    """The result as lines of text."""
    rows: list[tuple[str, ...]] = [("", "median", "low", "high", "n", "unit", "peer", "peer median", "ratio")]
    rows += [_row(item) for item in shown.measurements]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"{shown.benchmark} ({shown.mode}), {shown.machine.cpu}, {shown.machine.cores} cores"]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"note: {note}" for note in shown.notes)])


def _row(item: Measurement) -> tuple[str, ...]:
    figure, peer = item.figure, item.peer
    ours = (
        item.name,
        _number(figure.median),
        _number(figure.low),
        _number(figure.high),
        str(figure.samples),
        item.unit,
    )
    if peer is None:
        return (*ours, "", "", "")
    return (*ours, peer.name, _number(peer.figure.median), f"{peer.ratio:.2f}x")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
