"""Results of benchmarks: one form on disk, ratios that always say how much better we are, nothing of the machine's names."""

from __future__ import annotations

import getpass
import platform
from pathlib import Path

import msgspec
import pytest

from benchmarks.machine import describe_machine
from benchmarks.report import RESULTS, Result, compare, measure, percentile, read_result, result, table, write_result


def some_result() -> Result:
    measurements = [
        measure("decode B=1", "ms", [2.0, 1.0, 3.0]),
        compare("decode B=8", "ms", [4.0], ("transformers", [6.0]), "lower"),
        compare("prefill", "tok/s", [300.0], ("transformers", [200.0]), "higher"),
    ]
    return result("engine", "quick", {"threads": 2}, measurements, notes=["a note"])


def test_a_result_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    written = some_result()
    assert read_result(write_result(written, tmp_path)) == written


def test_a_ratio_above_one_means_that_we_are_better_whatever_the_direction() -> None:
    ratios = [item.peer.ratio for item in some_result().measurements if item.peer]
    assert ratios == [1.5, 1.5]


def test_a_figure_is_a_median_with_its_range() -> None:
    figure = some_result().measurements[0].figure
    assert (figure.median, figure.low, figure.high, figure.samples) == (2.0, 1.0, 3.0, 3)


def test_the_table_shows_every_measurement_and_note() -> None:
    shown = table(some_result())
    assert all(text in shown for text in ("decode B=1", "decode B=8", "1.50x", "transformers", "note: a note"))


def test_a_machine_is_described_without_its_name_or_paths() -> None:
    described = msgspec.json.encode(describe_machine()).decode()
    assert platform.node() not in described
    assert f"/{getpass.getuser()}" not in described
    assert str(Path.cwd()) not in described


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"benchmark": "engine"}')
    with pytest.raises(msgspec.ValidationError):
        read_result(path)


def test_every_committed_result_has_the_schema() -> None:
    for path in RESULTS.glob("*.json"):
        shown = read_result(path)
        assert path.stem == f"{shown.benchmark}-{shown.mode}"
        assert shown.measurements


@pytest.mark.parametrize(("percent", "expected"), [(0, 1), (50, 51), (99, 100), (100, 100)])
def test_percentiles_are_by_nearest_rank(percent: float, expected: float) -> None:
    assert percentile([float(number) for number in range(1, 101)], percent) == expected
