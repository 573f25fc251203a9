"""Owns which processes a cluster consists of. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from service_kit.config import PoolConfig
from service_kit.process import ProcessSpec

CONTROLLER = "controller"


def process_table(pool: PoolConfig, config_file: Path, python: str) -> tuple[ProcessSpec, ...]:
    """The controller, then the workers: p0, p1, … prefill, d0, … decode, b0, … both."""
    controller = ProcessSpec(CONTROLLER, (python, "-m", "controller", "--config", str(config_file)))
    workers = (
        ProcessSpec(name, (python, "-m", "worker", "--config", str(config_file), "--id", name, "--roles", roles))
        for name, roles in _workers(pool)
    )
    return (controller, *workers)


def _workers(pool: PoolConfig) -> Iterator[tuple[str, str]]:
    for prefix, count, roles in (
        ("p", pool.prefill, "prefill"),
        ("d", pool.decode, "decode"),
        ("b", pool.both, "prefill,decode"),
    ):
        yield from ((f"{prefix}{number}", roles) for number in range(count))
