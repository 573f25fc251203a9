"""The vLLM contender and its child, over a stand-in for vLLM: what is asked, what is timed, and that no wait lasts for ever."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.peer_process import ROOT, PeerFailed, PeerProcess, affinity, has_module
from benchmarks.vllm_peer import VllmOptions, child_environment, vllm_program

CORES = tuple(sorted(os.sched_getaffinity(0)))

STAND_IN = '''
import time
from types import SimpleNamespace as Space

__version__ = "0.0.1"
print("chatter on stdout")


class SamplingParams:
    def __init__(self, max_tokens, **others):
        self.max_tokens = max_tokens


class Engine:
    """Draws 1, 2, 3, …; takes one step per prompt to prefill it."""

    def __init__(self):
        self.requests = {}
        self.waiting = []
        self.vllm_config = Space(
            scheduler_config=Space(max_num_batched_tokens=4096), cache_config=Space(block_size=128)
        )

    def add_request(self, name, prompt, params):
        if prompt["prompt_token_ids"] == [666]:
            time.sleep(600)
        self.waiting.append((name, params.max_tokens))

    def step(self):
        if self.waiting:
            name, most = self.waiting.pop(0)
            self.requests[name] = [most, []]
        outputs = []
        for name, (most, tokens) in list(self.requests.items()):
            tokens.append(len(tokens) + 1)
            outputs.append(Space(request_id=name, outputs=[Space(token_ids=list(tokens))]))
            if len(tokens) == most:
                del self.requests[name]
        return outputs

    def abort_request(self, names):
        for name in names:
            self.requests.pop(name, None)

    def has_unfinished_requests(self):
        return bool(self.requests or self.waiting)


class LLM:
    def __init__(self, **settings):
        self.llm_engine = Engine()
'''


def python_with_stand_in(folder: Path) -> Path:
    (folder / "vllm.py").write_text(STAND_IN)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{folder}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


@contextmanager
def started(folder: Path, answer_s: float = 60.0) -> Iterator[PeerProcess]:
    options = VllmOptions("float32", CORES, 8193, 128, eager=False, answer_s=answer_s)
    peer = PeerProcess(vllm_program(python_with_stand_in(folder), folder, options), folder / "vllm.log")
    try:
        yield peer
    finally:
        peer.close()


def test_steps_are_timed_once_every_prompt_of_the_batch_is_prefilled(tmp_path: Path) -> None:
    with started(tmp_path) as peer:
        peer.begin([[1, 2, 3]] * 5)
        assert len(peer.steps_s(7)) == 7
        peer.end()
        assert peer.prefill_s([1, 2, 3]) > 0
        assert peer.greedy_tokens([1], 3) == [1, 2, 3]


def test_version_and_settings_come_from_the_engine_that_was_loaded(tmp_path: Path) -> None:
    with started(tmp_path) as peer:
        assert peer.name == "vLLM 0.0.1"
        assert peer.settings == {"token_budget": 4096, "block_tokens": 128, "compiled": True}


def test_a_batch_larger_than_a_pipe_holds_arrives_whole(tmp_path: Path) -> None:
    with started(tmp_path) as peer:
        peer.begin([list(range(10_000, 11_000))] * 64)
        assert len(peer.steps_s(1)) == 1


def test_the_child_may_use_its_cores_though_our_thread_is_bound_to_one() -> None:
    os.sched_setaffinity(0, CORES[:1])
    try:
        with affinity(CORES):
            assert os.sched_getaffinity(0) == set(CORES)
        assert os.sched_getaffinity(0) == set(CORES[:1])
    finally:
        os.sched_setaffinity(0, CORES)


def test_a_request_that_hangs_is_ended_at_its_deadline(tmp_path: Path) -> None:
    with started(tmp_path, answer_s=1.0) as peer, pytest.raises(PeerFailed, match="longer than 1 s"):
        peer.prefill_s([666])


def test_a_python_without_vllm_is_refused_with_the_reason(tmp_path: Path) -> None:
    options = VllmOptions("float32", CORES, 8193, 128, eager=False)
    with pytest.raises(PeerFailed, match="No module named 'vllm'"):
        PeerProcess(vllm_program(Path(sys.executable), tmp_path, options), tmp_path / "vllm.log")


def test_vllm_counts_as_installed_only_where_its_python_finds_it(tmp_path: Path) -> None:
    assert has_module(python_with_stand_in(tmp_path), "vllm")
    assert not has_module(Path(sys.executable), "vllm")
    assert not has_module(tmp_path / "none", "vllm")


def test_the_child_gets_one_thread_on_each_core_and_nothing_of_our_environment(tmp_path: Path) -> None:
    made = child_environment(tmp_path / "bin" / "python", (2, 3), {"PYTHONPATH": "ours", "HOME": "/home"})
    assert made["OMP_NUM_THREADS"] == "2"
    assert made["VLLM_CPU_OMP_THREADS_BIND"] == "2,3"
    assert made["HOME"] == "/home"
    assert made["PYTHONPATH"] == str(ROOT)  # where its child's modules are
    assert "LD_PRELOAD" not in made  # no OpenMP of Intel is there
