"""Owns a controller process with a fleet of modelled workers: what the controller's own cost is measured on."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.processes import Started, started, wait_for

START_S = 60.0


class _Addresses(msgspec.Struct):
    api_url: str
    grpc_address: str


class _Worker(msgspec.Struct):
    state: str


class _Status(msgspec.Struct):
    workers: list[_Worker]


@dataclass(frozen=True, slots=True)
class FleetShape:
    prefill: int
    decode: int
    cost: str
    processes: int = 1


@dataclass(frozen=True, slots=True)
class ModelledCluster:
    api_url: str
    processes: tuple[Started, ...]

    @property
    def http_address(self) -> str:
        return self.api_url.rstrip("/").rpartition("/")[2]


@contextmanager
def modelled_cluster(shape: FleetShape, model_dir: Path, folder: Path) -> Iterator[ModelledCluster]:
    """A controller and `shape` workers that are all ready; everything is ended when the block is left."""
    config = folder / "cluster.yaml"
    state_dir = folder / "state"
    tree = {
        "model": {"path": str(model_dir)},
        "controller": {"port": 0, "queue_limit": 4096},
        "transfer": {"transport": "inproc" if shape.processes == 1 else "tcp"},
        "state_dir": str(state_dir),
        "log": {"level": "warning"},
    }
    config.write_text(json.dumps(tree))  # JSON is YAML
    with started("controller", "controller", ["--config", str(config)], folder) as controller:
        addresses = wait_for("the controller", lambda: _addresses(state_dir), [controller], START_S)
        arguments = [
            *("--controllers", addresses.grpc_address, "--config", str(config), "--cost", shape.cost),
            *("--prefill", str(shape.prefill), "--decode", str(shape.decode), "--processes", str(shape.processes)),
        ]
        with started("fleet", "simulator.fleet", arguments, folder) as fleet:
            both = (controller, fleet)
            count = shape.prefill + shape.decode
            wait_for(f"{count} workers", lambda: _all_ready(addresses.api_url, count), both, START_S)
            yield ModelledCluster(addresses.api_url, both)


def _addresses(state_dir: Path) -> _Addresses | None:
    try:
        return msgspec.json.decode((state_dir / "controller.json").read_bytes(), type=_Addresses)
    except (FileNotFoundError, msgspec.DecodeError):
        return None  # not written yet, or half


def _all_ready(api_url: str, count: int) -> bool | None:
    try:
        with urllib.request.urlopen(f"{api_url}/api/v1/status", timeout=5) as answer:
            status = msgspec.json.decode(answer.read(), type=_Status)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None
    return True if sum(worker.state.lower() == "ready" for worker in status.workers) >= count else None
