"""Owns a peer engine in a process and an environment of its own, which answers the requests of `benchmarks/peer_child.py`."""

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
PEERS = ROOT / "build" / "peers"

LOAD_S = 420.0  # imports and compiles; vLLM: about 100 s on two cores
ANSWER_S = 600.0  # the slowest: 128 prompts, or 8,192 tokens, in a bf16 that the CPU only emulates
END_S = 20.0
PROBE_S = 120.0
NOT_INHERITED = ("PYTHONPATH", "VIRTUAL_ENV", "GOMP_CPU_AFFINITY", "OMP_NUM_THREADS")

Setting = str | int | float | bool


class PeerFailed(RuntimeError):
    """The child ended, ran past its deadline or answered with an error."""


@dataclass(frozen=True, slots=True)
class PeerProgram:
    """How a peer is started."""

    title: str
    python: Path
    module: str  # of this repository, run by that python
    environment: Mapping[str, str]
    cores: tuple[int, ...]  # that it may use, one thread on each
    load: Mapping[str, Setting]  # its first request
    answer_s: float = ANSWER_S  # deadline of every request but the loading


class _Answer(msgspec.Struct, frozen=True):
    error: str = ""
    version: str = ""
    settings: dict[str, Setting] = msgspec.field(default_factory=dict)
    seconds: list[float] = msgspec.field(default_factory=list)
    token_ids: list[int] = msgspec.field(default_factory=list)


def peer_python(name: str) -> Path:
    """The python of the environment that `make peers-setup` made, or the one that PDSERVE_<NAME>_PYTHON names."""
    # What lies under a .venv counts nowhere as our source.
    return Path(os.environ.get(f"PDSERVE_{name.upper()}_PYTHON") or PEERS / name / ".venv" / "bin" / "python")


def has_module(python: Path, module: str) -> bool:
    """Whether `python` exists and finds `module` to import."""
    if not python.is_file():
        return False
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", probe], check=False, timeout=PROBE_S).returncode == 0


def inherited_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Ours without what would bind or mislead a peer, and with the way to the children's modules."""
    kept = {name: value for name, value in inherited.items() if name not in NOT_INHERITED}
    return {**kept, "PYTHONPATH": str(ROOT)}


@contextmanager
def affinity(cores: Sequence[int]) -> Iterator[None]:
    """Processes started inside may use `cores`, whichever of them our own thread is bound to."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class PeerProcess:
    """A DecodeContender and PrefillContender. Every request has a deadline; past it the child is killed."""

    def __init__(self, program: PeerProgram, log: Path) -> None:
        """Raises PeerFailed if the engine does not come up."""
        self._title = program.title
        self._log = log
        self._answer_s = program.answer_s
        with log.open("wb") as errors, affinity(program.cores):
            self._process = subprocess.Popen(
                [program.python, "-m", program.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=program.environment,
                cwd=log.parent,
                start_new_session=True,  # so that its compilers end with it
            )
        try:
            loaded = self._ask({"op": "load", **program.load}, LOAD_S)
        except PeerFailed:
            self.close()
            raise
        self.name = f"{program.title} {loaded.version}"
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
            raise PeerFailed(f"{request['op']}: {self._title} ended, or took longer than {limit_s:.0f} s:\n{tail}")
        answer = msgspec.json.decode(line, type=_Answer)
        if answer.error:
            raise PeerFailed(f"{request['op']}: {answer.error}")
        return answer

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
