"""The fit at start-up, by the real kernels of this machine; and that it changes no bit whatever it says."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.attention_cost import is_plausible, shipped_costs
from engine.attention_fit import KvShape, fitted_costs
from engine.attention_plan import Cut, Reader, plan
from engine.kernel_attention import ReaderBlocks, task_arrays
from engine.kernels.library import Kernels, built_sets, load_kernels
from engine.step_work import Threads
from tests.engine.rig import families, open_native, save_random

PAGE = 16


@pytest.fixture(params=built_sets())
def kernels(request: pytest.FixtureRequest) -> Kernels:
    loaded = load_kernels(request.param.lower(), torch.bfloat16)
    assert loaded is not None
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_costs_are_plausible_and_as_many_threads_as_before_compute(kernels: Kernels, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    costs = fitted_costs(kernels, KvShape(2, 32, PAGE, dtype))
    assert torch.get_num_threads() == before
    assert is_plausible(costs, shipped_costs(kernels.lanes, kernels.panel))
    assert (costs.lanes, costs.panel) == (kernels.lanes, kernels.panel)


def test_engines_of_one_shape_fit_once(kernels: Kernels) -> None:
    shape = KvShape(1, 16, PAGE, torch.float32)
    assert fitted_costs(kernels, shape) is fitted_costs(kernels, shape)


def test_no_bit_depends_on_what_was_fitted(kernels: Kernels) -> None:
    """Where everything is shared, where nothing is, and in between."""
    pages = kernels.chunk // PAGE
    trunk, tails = np.arange(3 * pages), iter(range(3 * pages, 10**6))
    readers = [
        Reader(2 * i, 2, 3 * kernels.chunk + 5 * i, np.append(trunk, [next(tails) for _ in range(4)]).astype(np.int32))
        for i in range(9)
    ]
    ends = torch.cat([torch.arange(each.first, each.first + 2, dtype=torch.int32) + 1 for each in readers])
    generator = torch.Generator().manual_seed(3)
    pool = torch.randn(next(tails), 2, PAGE, 2, 32, generator=generator)
    query = torch.randn(len(ends), 6, 32, generator=generator)
    shipped = shipped_costs(kernels.lanes, kernels.panel)
    fits = [
        shipped,
        fitted_costs(kernels, KvShape(2, 32, PAGE, torch.float32)),
        replace(shipped, partial=1.0),  # nothing pays
        replace(shipped, vector=0.0, query=0.0, task=0.0, partial=0.0, read_many=0.0),  # everything does
    ]
    results, shared = [], []
    for costs, threads in itertools.product(fits, (Threads(1, 2), Threads(4, 2))):
        tasks = plan(readers, Cut(kernels.chunk, PAGE, 0, threads.units, True, 3, costs, threads))
        shared.append(any(len(members) > 1 for members in tasks.members))
        arrays = task_arrays(tasks, ReaderBlocks.of(readers), torch.zeros_like(ends), ends)
        results.append(kernels.attention(query, pool, arrays))
    assert set(shared) == {True, False}
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize(
    ("family", "settings", "fits"),
    [
        ("llama", {}, True),
        ("llama", {"shared_prefix_attention": False}, False),
        ("mistral-window", {}, False),  # every layer has one
        ("llama", {"kernels": "torch"}, False),
        ("llama", {"block_tokens": 80}, False),  # a chunk's borders lie inside blocks
    ],
)
def test_an_engine_fits_where_it_can_share(
    family: str, settings: dict[str, int | bool | str], fits: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_random(families()[family], tmp_path)
    fitted_costs.cache_clear()
    with caplog.at_level("INFO", "engine.attention_fit"):
        engine, _ = open_native(tmp_path, settings)
    engine.close()
    assert [record.getMessage() for record in caplog.records if record.name == "engine.attention_fit"] == (
        ["attention_fitted"] if fits else []
    )


def test_times_that_no_machine_can_have_leave_the_shipped_costs(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "engine.attention_fit.time.perf_counter", itertools.count().__next__
    )  # every call takes a second
    fitted_costs.cache_clear()
    got = fitted_costs(kernels, KvShape(1, 32, PAGE, torch.float32))
    assert got == replace(shipped_costs(kernels.lanes, kernels.panel), cached_chunks=got.cached_chunks)
    fitted_costs.cache_clear()
