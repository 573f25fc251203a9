"""Owns the description of the machine that a result was measured on. No host names, no paths."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import msgspec

_PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "grpcio",
    "uvloop",
    "uvicorn",
    "fastapi",
    "msgspec",
    "xxhash",
    "ucxx-cu12",
    "libucx-cu12",
)


class Machine(msgspec.Struct, frozen=True):
    cpu: str
    cores: int  # that this process may use
    memory_gib: float
    accelerator: str  # empty = none
    system: str
    python: str
    versions: dict[str, str]
    load_average: float  # over one minute, when the benchmark began: above ~0.5 the run was not quiet


def describe_machine(accelerator: str = "") -> Machine:
    return Machine(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        accelerator=accelerator,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions=_versions(),
        load_average=round(os.getloadavg()[0], 2),
    )


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
