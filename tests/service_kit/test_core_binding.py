"""Which cores the engines get: disjoint slices or none, never another cluster's, and a list is taken as it is or refused."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pdserve.errors import ConfigInvalid
from service_kit.config import EngineConfig
from service_kit.core_binding import (
    MachineCores,
    bind_engines,
    engine_threads,
    listed_cores,
    openmp_environment,
    service_cores,
)
from service_kit.core_claims import CoreClaims, machine_cores
from tests.child_processes import end, killed_after

ROOT = Path(__file__).resolve().parent.parent.parent


def machine(cores: int, *, taken: int = 0) -> MachineCores:
    """Cores without siblings, of which other clusters have the first `taken`."""
    allowed = tuple(range(cores))
    return MachineCores(allowed, frozenset(allowed[taken:]), {core: core for core in allowed})


@st.composite
def machines(draw: st.DrawFn) -> MachineCores:
    allowed = tuple(sorted(draw(st.sets(st.integers(0, 127), min_size=1, max_size=64))))
    free = draw(st.sets(st.sampled_from(allowed)))
    # Siblings: none, beside each other, or half the cores apart, as different machines number them.
    physical = draw(
        st.sampled_from(
            (
                {core: core for core in allowed},
                {core: core - core % 2 for core in allowed},
                {core: core % 64 for core in allowed},
            )
        )
    )
    return MachineCores(allowed, frozenset(free), physical)


@given(machines(), st.integers(0, 16), st.integers(0, 8))
def test_auto_gives_every_engine_free_cores_of_its_own_or_none_to_all(
    machine: MachineCores, workers: int, threads: int
) -> None:
    engine = EngineConfig(threads=threads)
    binding = bind_engines(engine, workers, machine)
    given_out = [core for own in binding.cores for core in own]
    assert len(binding.cores) == workers
    assert len(given_out) == len(set(given_out))
    assert set(given_out) <= machine.free
    wanted = engine_threads(engine, (), workers, len(machine.allowed))
    if given_out:
        assert {len(own) for own in binding.cores} == {wanted}
        assert not binding.reason
    elif workers:
        assert binding.reason
        assert wanted < 2 or wanted * workers > len(machine.free)


@given(machines(), st.integers(1, 4), st.integers(2, 4))
def test_two_threads_share_a_physical_core_only_where_there_are_too_few_of_them(
    machine: MachineCores, workers: int, threads: int
) -> None:
    binding = bind_engines(EngineConfig(threads=threads), workers, machine)
    used = [machine.physical[core] for own in binding.cores for core in own]
    if len({machine.physical[core] for core in machine.free}) >= workers * threads:
        assert len(set(used)) == workers * threads


@given(machines(), st.integers(1, 8), st.integers(0, 4))
def test_a_list_is_divided_in_its_order_or_refused(machine: MachineCores, workers: int, threads: int) -> None:
    listed = machine.allowed[: max(1, len(machine.allowed) // 2)]
    engine = EngineConfig(cores=",".join(map(str, listed)), threads=threads)
    each = threads or max(1, len(listed) // workers)
    if each * workers > len(listed):
        with pytest.raises(ConfigInvalid, match="cores, but"):
            bind_engines(engine, workers, machine)
        return
    binding = bind_engines(engine, workers, machine)
    assert [core for own in binding.cores for core in own] == list(listed[: each * workers])
    assert {len(own) for own in binding.cores} == {each}


def test_siblings_of_one_physical_core_go_to_one_engine_where_all_are_needed() -> None:
    halves = MachineCores((0, 1, 2, 3), frozenset(range(4)), {0: 0, 1: 1, 2: 0, 3: 1})
    assert bind_engines(EngineConfig(), 2, halves).cores == ((0, 2), (1, 3))
    assert bind_engines(EngineConfig(threads=2), 1, halves).cores == ((0, 1),)


def test_an_engine_with_one_thread_is_not_bound_unless_a_list_says_so() -> None:
    assert bind_engines(EngineConfig(), 2, machine(2)).cores == ((), ())
    assert bind_engines(EngineConfig(cores="0-1"), 2, machine(2)).cores == ((0,), (1,))


def test_cores_that_another_cluster_has_bound_are_left_to_it_and_the_reason_names_them() -> None:
    binding = bind_engines(EngineConfig(), 2, machine(4, taken=1))
    assert binding.cores == ((), ())
    assert binding.reason == "2 engines of 2 threads do not fit 4 cores, 1 of them bound by other clusters"
    assert bind_engines(EngineConfig(threads=2), 1, machine(4, taken=2)).cores == ((2, 3),)


def test_none_binds_nothing() -> None:
    assert bind_engines(EngineConfig(cores="none"), 2, machine(8)).cores == ((), ())


@pytest.mark.parametrize("text", ["", "0-", "-1", "0,,1", "all", "0-99999", "1 2"])
def test_a_list_that_is_none_is_refused_with_the_configuration(text: str) -> None:
    with pytest.raises(ValidationError):
        EngineConfig(cores=text)


@pytest.mark.parametrize(
    ("text", "said"),
    [("3-1", "ends before it begins"), ("0-2,2", "twice"), ("0,7", "core 7, which this process may not")],
)
def test_a_list_that_cannot_be_is_refused_with_its_reason(text: str, said: str) -> None:
    with pytest.raises(ConfigInvalid, match=said):
        bind_engines(EngineConfig(cores=text), 1, machine(4))


def test_ranges_and_single_cores_are_listed_ascending() -> None:
    assert listed_cores("6,0-3") == (0, 1, 2, 3, 6)


@given(machines(), st.integers(1, 8), st.integers(1, 4))
def test_services_keep_off_the_cores_of_engines_or_run_anywhere(
    machine: MachineCores, workers: int, threads: int
) -> None:
    binding = bind_engines(EngineConfig(threads=threads), workers, machine)
    kept = service_cores("auto", binding.cores, machine.allowed)
    taken = {core for own in binding.cores for core in own}
    assert not taken.intersection(kept)
    if kept:
        assert set(kept) | taken == set(machine.allowed)
    assert bool(kept) == (bool(taken) and len(machine.allowed) - len(taken) >= workers)


def test_services_run_anywhere_where_too_few_cores_are_left_or_none_is_asked_for() -> None:
    allowed = (0, 1, 2, 3)
    assert service_cores("auto", ((0,), (2,)), allowed) == (1, 3)
    assert service_cores("auto", ((1,), (2, 3)), allowed) == ()
    assert service_cores("auto", ((), ()), allowed) == ()
    assert service_cores("none", ((2, 3),), allowed) == ()


def test_services_take_a_list_as_it_is_or_refuse_it_by_the_setting() -> None:
    assert service_cores("3,0-1", ((0, 1),), (0, 1, 2, 3)) == (0, 1, 3)
    with pytest.raises(ConfigInvalid, match=r"pool.service_cores names core 9, which this process may not use"):
        service_cores("9", (), (0, 1))
    with pytest.raises(ConfigInvalid, match=r"pool.service_cores is 0,0, which names a core twice"):
        service_cores("0,0", (), (0, 1))


def test_openmp_gets_one_thread_for_each_core_and_nothing_where_none_is_bound() -> None:
    bound = openmp_environment((2, 3), {})
    assert (bound["GOMP_CPU_AFFINITY"], bound["OMP_NUM_THREADS"]) == ("2 3", "2")
    assert openmp_environment((), {}).keys() == {"GOMP_SPINCOUNT"}


def test_openmp_threads_spin_as_long_as_the_operator_says() -> None:
    assert "GOMP_SPINCOUNT" not in openmp_environment((2, 3), {"OMP_WAIT_POLICY": "active"})
    assert "GOMP_SPINCOUNT" not in openmp_environment((), {"GOMP_SPINCOUNT": "0"})


def test_a_claim_ends_with_its_holder() -> None:
    name = f"test-{uuid.uuid4()}"
    program = (
        "import sys; from service_kit.core_claims import CoreClaims\n"
        f"claims = CoreClaims({name!r}); print(sorted(claims.take([0, 1, 2])), flush=True)\n"
        "claims.keep([1]); print('kept', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    ours = CoreClaims(name)
    with child, killed_after(child, 60.0):
        assert child.stdout.readline() == "[0, 1, 2]\n"
        assert child.stdout.readline() == "kept\n"
        assert ours.take([0, 1, 2]) == {0, 2}
        end(child)
    assert ours.take([1]) == {0, 1, 2}
    ours.keep([])


def test_this_machine_has_every_allowed_core_and_its_physical_one() -> None:
    found = machine_cores(frozenset())
    assert set(found.allowed) == os.sched_getaffinity(0) == set(found.physical)
