"""Owns vLLM as a contender: a child process in an environment of its own that answers `benchmarks/vllm_child.py`'s requests.

The engine, its scheduler and its one worker are that one process, with as many threads as ours on the same cores. This spares
vLLM the messages between its processes, so it is measured at its best.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / "build" / "peers" / "vllm" / ".venv"  # what lies under a .venv counts nowhere as our source
DEFAULT_PYTHON = VENV / "bin" / "python"
CACHE = VENV / "cache"
CHILD = Path(__file__).with_name("vllm_child.py")

LOAD_S = 420.0  # imports and compiles; about 100 s on two cores
ANSWER_S = 600.0  # the slowest: 128 prompts, or 8,192 tokens, in a bf16 that the CPU only emulates
END_S = 20.0
PROBE_S = 120.0
KV_GIB = 2
NOT_INHERITED = ("PYTHONPATH", "VIRTUAL_ENV", "GOMP_CPU_AFFINITY")

Setting = str | int | float | bool


class VllmFailed(RuntimeError):
    """The child ended, ran past its deadline or answered with an error."""


@dataclass(frozen=True, slots=True)
class VllmOptions:
    dtype: str
    cores: tuple[int, ...]  # one thread on each
    max_tokens: int
    max_sequences: int
    eager: bool
    answer_s: float = ANSWER_S  # deadline of every request but the loading


class _Answer(msgspec.Struct, frozen=True):
    error: str = ""
    version: str = ""
    settings: dict[str, Setting] = msgspec.field(default_factory=dict)
    seconds: list[float] = msgspec.field(default_factory=list)
    token_ids: list[int] = msgspec.field(default_factory=list)


def has_vllm(python: Path) -> bool:
    """Whether `python` exists and finds a vllm to import."""
    if not python.is_file():
        return False
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    return subprocess.run([python, "-c", probe], check=False, timeout=PROBE_S).returncode == 0


def child_environment(python: Path, cores: Sequence[int], inherited: Mapping[str, str]) -> dict[str, str]:
    """What vLLM's own launcher sets for a worker: OpenMP of Intel where it is installed, one thread bound to each core."""
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    preload = {"LD_PRELOAD": str(openmp)} if openmp.is_file() else {}
    bound = ",".join(map(str, cores))
    return {
        **{name: value for name, value in inherited.items() if name not in NOT_INHERITED},
        **preload,
        "OMP_NUM_THREADS": str(len(cores)),
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{bound}]",
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
        "VLLM_CPU_OMP_THREADS_BIND": bound,
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(CACHE / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
        "HF_HUB_OFFLINE": "1",
    }


@contextmanager
def affinity(cores: Sequence[int]) -> Iterator[None]:
    """Processes started inside may use `cores`, whichever of them our own thread is bound to."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class VllmPeer:
    """A DecodeContender and PrefillContender. Every request has a deadline; past it the child is killed."""

    def __init__(self, python: Path, model_dir: Path, options: VllmOptions, log: Path) -> None:
        """Raises VllmFailed if the engine does not come up."""
        self._log = log
        self._answer_s = options.answer_s
        with log.open("wb") as errors, affinity(options.cores):
            self._process = subprocess.Popen(
                [python, CHILD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=child_environment(python, options.cores, os.environ),
                cwd=log.parent,
                start_new_session=True,  # so that its compilers end with it
            )
        request = {
            "op": "load",
            "model_dir": str(model_dir),
            "dtype": options.dtype,
            "max_tokens": options.max_tokens,
            "max_sequences": options.max_sequences,
            "eager": options.eager,
        }
        try:
            loaded = self._ask(request, LOAD_S)
        except VllmFailed:
            self.close()
            raise
        self.name = f"vLLM {loaded.version}"
        self.settings = loaded.settings

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        self._ask({"op": "begin", "prompts": prompts}, self._answer_s)

    def steps_s(self, count: int) -> list[float]:
        return self._ask({"op": "steps", "count": count}, self._answer_s).seconds

    def end(self) -> None:
        self._ask({"op": "end"}, self._answer_s)

    def prefill_s(self, prompt: Sequence[int]) -> float:
        return self._ask({"op": "prefill", "prompt": prompt}, self._answer_s).seconds[0]

    def greedy_tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        return self._ask({"op": "tokens", "prompt": prompt, "count": count}, self._answer_s).token_ids

    def close(self) -> None:
        """Ends the child: by the end of its input, and by force if it does not follow."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # what a killed child did not read
                self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait(END_S)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _ask(self, request: Mapping[str, object], limit_s: float) -> _Answer:
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None
        assert pipe_out is not None
        watchdog = threading.Timer(limit_s, self._kill)  # ends the write as well as the read
        watchdog.start()
        try:
            pipe_in.write(msgspec.json.encode(request) + b"\n")
            pipe_in.flush()
            line = pipe_out.readline()
        except BrokenPipeError:
            line = b""
        finally:
            watchdog.cancel()
        if not line:
            tail = self._log.read_text(errors="replace")[-2000:]
            raise VllmFailed(f"{request['op']}: vLLM ended, or took longer than {limit_s:.0f} s:\n{tail}")
        answer = msgspec.json.decode(line, type=_Answer)
        if answer.error:
            raise VllmFailed(f"{request['op']}: {answer.error}")
        return answer

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
