"""The checks of `make gpu`, rehearsed on the CPU: that they run, and that they can fail. Nothing here has run on a GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cuda
from benchmarks.cuda_beside import Beside, check_beside
from benchmarks.cuda_checks import CHECKED, TOLERANCES, Variant, Watcher, beyond, check_engine, check_exports, not_taken
from benchmarks.random_model import LlamaShape, write_random_llama
from benchmarks.report import measure

TINY = LlamaShape(layers=2, hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=256, vocab=500)
SMALL = cuda.Sizes(
    model=TINY, kv_bytes=2**22, rounds=2, batches=(2,), prompts=(40,), shared=(64, 2), export_blocks=8, busy_side=16,
    beside=Beside(TINY, 2**22, decodes=2, context=10, prompts=2, prompt=80, chunks=(40,)),
)  # fmt: skip


def test_an_engine_passes_its_check_on_the_cpu() -> None:
    one = check_engine("cpu", Variant("float32", "auto", graphs=True), threads=1)
    assert one.failures == ()
    assert all(item.figure.samples == 6 for item in one.measurements)


@pytest.mark.parametrize("value", [2e-3, float("inf"), float("nan")])
def test_a_deviation_beyond_the_tolerance_is_a_failure(value: float) -> None:
    checks = [measure("near", "nat", [1e-6]), measure("far", "nat", [value])]
    (found,) = beyond(checks, TOLERANCES["float32"])
    assert found.startswith("far")


def test_falling_back_is_not_passed_off_as_a_check_of_what_was_asked_for(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    variant = Variant("bfloat16", "auto", graphs=True)
    driver = variant.open(write_random_llama(tmp_path_factory.mktemp("model"), CHECKED), "cpu", 1, 2**22)
    assert len(list(not_taken(driver, variant))) == 2
    assert list(not_taken(driver, Variant("bfloat16", "torch", graphs=False))) == []
    driver.close()


def test_exports_pass_their_check_on_the_cpu() -> None:
    assert check_exports("cpu").failures == ()


def test_an_announcement_that_comes_early_is_seen() -> None:
    contents, arena = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    watcher = Watcher(arena, contents, [0, 2])
    watcher.look(0)
    arena.copy_(contents)
    watcher.look(1)
    assert (watcher.layers, watcher.early) == ([0, 1], [0])


def test_prompts_beside_decodes_pass_their_check_on_the_cpu() -> None:
    one = check_beside("cpu", "float32", threads=1)
    assert one.failures == ()
    assert all(item.figure.samples == 7 for item in one.measurements)


def test_prompts_that_are_not_beside_decodes_fail_that_check() -> None:
    one = check_beside("cpu", "float32", 1, lambda model, engine: None)
    assert len(one.failures) == 1
    assert one.failures[0].endswith("no decode was computed while a prompt was in the air")


def test_the_benchmarks_run_in_small() -> None:
    names = [item.name for item in cuda.timed("cpu", SMALL, cuda.TIMED[-1:])]
    assert len(names) == len(set(names)) == 10


def test_without_a_device_nothing_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    assert not torch.cuda.is_available()
    assert cuda.main([]) == cuda.NO_DEVICE
    assert "nothing was checked" in capsys.readouterr().err
