"""Owns which processes a cluster consists of. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from service_kit.config import PoolConfig
from service_kit.core_binding import Cores
from service_kit.process import ProcessSpec

CONTROLLER = "controller"


def process_table(
    pool: PoolConfig, config_file: Path, python: str, cores: Sequence[Cores], service: Cores
) -> tuple[ProcessSpec, ...]:
    """The controller, then the workers: p0, p1, … prefill, d0, … decode, b0, … both.

    cores: of every worker in that order, those that its engine is bound to; empty where it is not.
    service: those of the controller and the io processes; empty: any.
    """
    given = ("--config", str(config_file), *_set("pool.service_cores", service))
    controller = ProcessSpec(CONTROLLER, (python, "-m", "controller", *given))
    common = (python, "-m", "worker", *given)
    workers = (
        ProcessSpec(name, (*common, "--id", name, "--roles", roles, *_set("engine.cores", own)))
        for (name, roles), own in zip(_workers(pool), cores, strict=True)
    )
    return (controller, *workers)


def _set(name: str, cores: Cores) -> tuple[str, ...]:
    return ("--set", f"{name}={','.join(map(str, cores))}") if cores else ()


def _workers(pool: PoolConfig) -> Iterator[tuple[str, str]]:
    for prefix, count, roles in (
        ("p", pool.prefill, "prefill"),
        ("d", pool.decode, "decode"),
        ("b", pool.both, "prefill,decode"),
    ):
        yield from ((f"{prefix}{number}", roles) for number in range(count))
