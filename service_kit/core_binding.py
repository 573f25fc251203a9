"""Owns which cores the threads of each engine are bound to, and which are left to everybody else of a cluster. Pure.

Unbound, the kernel now and then puts two OpenMP threads of one engine on one core, and every barrier then waits for a time slice:
decode steps take 4 to 10 times as long until the load balancer notices. One thread alone meets no barrier; bound, it could only
queue behind whatever else runs on its core.

A thread of the controller or of an io process that the kernel wakes on a core of an engine takes it from one of its threads, and the
whole step waits at the next barrier. So they keep off those cores where enough others are left.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pdserve.errors import ConfigInvalid
from service_kit.config import EngineConfig

Cores = tuple[int, ...]

_SPINS = "20000"  # libgomp's own are about 2 ms of a core that io processes and other engines wait for
_SPINNING = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}  # where the operator says how long


@dataclass(frozen=True, slots=True)
class MachineCores:
    """What is known of the cores of this machine."""

    allowed: Cores  # that this process may use, ascending
    free: frozenset[int]  # of those, the ones that no other cluster has bound its engines to
    physical: Mapping[int, int]  # of every allowed core: the lowest of the cores that share its execution units


@dataclass(frozen=True, slots=True)
class CoreBinding:
    """cores: one entry per worker, empty where its threads are not bound; `reason` then says why."""

    cores: tuple[Cores, ...]
    reason: str = ""


def bind_engines(engine: EngineConfig, workers: int, machine: MachineCores) -> CoreBinding:
    """Disjoint cores for the engines of `workers` workers, one core per thread.

    Raises ConfigInvalid where `engine.cores` lists cores that are not there, or too few of them.
    """
    listed = listed_cores(engine.cores)
    if listed:
        _check_allowed(listed, machine.allowed, "engine.cores")
        return CoreBinding(_divided_list(engine, listed, workers))
    unbound: tuple[Cores, ...] = ((),) * workers
    if engine.cores == "none":
        return CoreBinding(unbound, "engine.cores is none")
    threads = engine_threads(engine, (), workers, len(machine.allowed))
    if threads < 2:
        return CoreBinding(unbound, "every engine has one thread, which waits for no other")
    wanted = threads * workers
    if wanted > len(machine.free):
        taken = len(machine.allowed) - len(machine.free)
        held = f", {taken} of them bound by other clusters" if taken else ""
        reason = f"{workers} engines of {threads} threads do not fit {len(machine.allowed)} cores{held}"
        return CoreBinding(unbound, reason)
    return CoreBinding(tuple(_slices(_spread(machine, wanted), workers, threads)))


def service_cores(setting: str, engines: Sequence[Cores], allowed: Cores) -> Cores:
    """Cores of the controller and of the io process of each worker; none of them: anywhere. engines: the cores of each engine.

    Raises ConfigInvalid where `setting`, pool.service_cores, lists cores that are not there.
    """
    listed = listed_cores(setting, "pool.service_cores")
    if listed or setting == "none":
        _check_allowed(listed, allowed, "pool.service_cores")
        return listed
    taken = {core for own in engines for core in own}
    left = tuple(core for core in allowed if core not in taken)
    return left if taken and len(left) >= len(engines) else ()


def engine_threads(engine: EngineConfig, cores: Cores, workers: int, allowed: int) -> int:
    """Compute threads of one engine. cores: those it is bound to; allowed: how many it may use where it is not bound."""
    return engine.threads or len(cores) or max(1, allowed // max(1, workers))


def openmp_environment(cores: Cores, inherited: Mapping[str, str]) -> dict[str, str]:
    """What binds the OpenMP threads of a process, one to each core, and lets a thread that waits go to sleep soon, where the variables
    that it has `inherited` do not say how long it spins. OpenMP reads them when torch is imported, not later."""
    spins = {} if _SPINNING & inherited.keys() else {"GOMP_SPINCOUNT": _SPINS}
    if not cores:
        return spins
    return {**spins, "GOMP_CPU_AFFINITY": " ".join(map(str, cores)), "OMP_NUM_THREADS": str(len(cores))}


def listed_cores(setting: str, name: str = "engine.cores") -> Cores:
    """The cores that the value of the setting `name` lists, ascending; none for the words. Raises ConfigInvalid."""
    if setting in ("auto", "none"):
        return ()
    found = [core for part in setting.split(",") for core in _range(part, setting, name)]
    if len(set(found)) != len(found):
        raise ConfigInvalid(f"{name} is {setting}, which names a core twice.")
    return tuple(sorted(found))


def _range(part: str, setting: str, name: str) -> range:
    first, _, last = part.partition("-")
    if last and int(last) < int(first):
        raise ConfigInvalid(f"{name} is {setting}, but {part} ends before it begins.")
    return range(int(first), int(last or first) + 1)


def _check_allowed(listed: Cores, allowed: Collection[int], name: str) -> None:
    missing = [core for core in listed if core not in allowed]
    if missing:
        usable = ",".join(map(str, sorted(allowed)))
        raise ConfigInvalid(f"{name} names core {missing[0]}, which this process may not use. It may use {usable}.")


def _divided_list(engine: EngineConfig, listed: Cores, workers: int) -> tuple[Cores, ...]:
    threads = engine.threads or max(1, len(listed) // max(1, workers))
    if threads * workers > len(listed):
        raise ConfigInvalid(
            f"engine.cores lists {len(listed)} cores, but {workers} engines of {threads} threads need {threads * workers}. "
            "List more, lower engine.threads, or set engine.cores to auto or none."
        )
    return tuple(_slices(listed, workers, threads))


def _spread(machine: MachineCores, wanted: int) -> Cores:
    """`wanted` free cores: of each physical core one, where there are enough; else siblings beside each other."""
    free = sorted(machine.free, key=lambda core: (machine.physical[core], core))
    alone = [core for core, before in zip(free, [-1, *free], strict=False) if not _siblings(machine, core, before)]
    return tuple((alone if len(alone) >= wanted else free)[:wanted])


def _siblings(machine: MachineCores, core: int, other: int) -> bool:
    return other in machine.physical and machine.physical[core] == machine.physical[other]


def _slices(cores: Sequence[int], workers: int, threads: int) -> Iterator[Cores]:
    """Neighbours together: they are likelier to share a cache and a memory node."""
    yield from (tuple(cores[number * threads : (number + 1) * threads]) for number in range(workers))
