"""Owns the checks before a cluster starts and in `doctor`: python, torch, transport, model, port, memory."""

from __future__ import annotations

import platform
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from pdserve.cli.record import Record
from pdserve.cli.terminal import Mark, size

PROCESS_BYTES = 250 * 10**6  # of an engine process with torch, before weights and KV
CONTROLLER_BYTES = 150 * 10**6
DEFAULT_POOL_BYTES = 256 * 2**20  # on the CPU, where engine.kv_bytes is 0


@dataclass(frozen=True, slots=True)
class Check:
    mark: Mark
    name: str
    text: str
    remedy: str = ""


def preflight(config: Record) -> list[Check]:
    """`config`: as `read_config` gives it."""
    return [_python(), _torch(), _transport(config), _model(config), _port(config), _memory(config)]


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()}"
    if sys.platform != "linux":
        return Check("fail", "python", found, "Servers run on Linux; elsewhere use the SDK against a remote cluster.")
    return Check("ok", "python", found)


def _torch() -> Check:
    try:
        return Check("ok", "torch", version("torch"))
    except PackageNotFoundError:
        return Check("fail", "torch", "not installed", "Run `make setup`, or pip install torch.")


def _transport(config: Record) -> Check:
    wanted = config.record("transfer").text("transport")
    ucx = find_spec("ucxx") is not None or find_spec("ucp") is not None
    if wanted == "ucx" and not ucx:
        return Check(
            "fail", "transport", "ucx wanted, ucxx not installed", "pip install ucxx-cu12, or --transport tcp."
        )
    if wanted == "nixl" and find_spec("nixl") is None:
        return Check(
            "fail", "transport", "nixl wanted, but not installed", "pip install 'pdserve[nixl]', or --transport auto."
        )
    if wanted == "auto" and not ucx:
        return Check("warn", "transport", "tcp, because ucxx is not installed", "pip install ucxx-cu12 for RDMA.")
    return Check("ok", "transport", "ucx" if wanted == "auto" else wanted)


def _model(config: Record) -> Check:
    path = Path(config.record("model").text("path"))
    if not path.is_dir():
        return Check("fail", "model", f"{path} is no directory", "Give a checkpoint: pdserve up --model DIR_OR_HUB_ID.")
    if not (path / "config.json").is_file():
        return Check("fail", "model", f"{path} has no config.json", "Give the directory of a Hugging Face checkpoint.")
    weights = weight_bytes(path)
    if not weights:
        return Check("fail", "model", f"{path} has no *.safetensors", "Only safetensors weights are loaded.")
    return Check("ok", "model", f"{path} ({size(weights)})")


def weight_bytes(model_dir: Path) -> int:
    return sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))


def _port(config: Record) -> Check:
    controller = config.record("controller")
    host, port = controller.text("host"), controller.integer("port")
    if port == 0:
        return Check("ok", "port", "a free one")
    if _can_bind(host, port):
        return Check("ok", "port", f"{host}:{port}")
    return Check("warn", "port", f"{host}:{port} is taken, a free one is used", "Choose one: pdserve up --port N")


def _can_bind(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _memory(config: Record) -> Check:
    pool, engine = config.record("pool"), config.record("engine")
    workers = pool.integer("prefill") + pool.integer("decode") + pool.integer("both")
    weights = weight_bytes(Path(config.record("model").text("path")))
    pool_bytes = engine.integer("kv_bytes") or DEFAULT_POOL_BYTES
    needed = workers * (PROCESS_BYTES + 2 * weights + pool_bytes) + CONTROLLER_BYTES
    available, free = _available_bytes(), "are free"
    if not engine.integer("kv_bytes"):  # a pool sized from free memory leaves the reserve alone
        available = max(0, available - int(engine.number("memory_reserve") * _meminfo("MemTotal")))
        free = "are free beyond engine.memory_reserve"
    if not workers:
        return Check("fail", "workers", "none asked for", "Give --prefill N and --decode M, or --both K.")
    text = f"{workers} workers need about {size(needed)}, {size(available)} {free}"
    if needed > available:
        return Check("warn", "memory", text, "Fewer workers, or --set engine.kv_bytes=BYTES with a smaller pool.")
    return Check("ok", "memory", text)


def _available_bytes() -> int:
    """MemAvailable, or less where a control group allows less."""
    limits = [_meminfo("MemAvailable"), *_cgroup_room()]
    return min(limits)


def _meminfo(name: str) -> int:
    """Bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _cgroup_room() -> Iterator[int]:
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file():
        text = limit.read_text().strip()
        if text.isdigit():
            yield int(text) - int(used.read_text())
