"""The engine against others in one run, beside the floors: same weights, threads and cores, fp32 and bf16.

`python -m benchmarks.peers [--full] [--threads N] [--dtype float32|bfloat16] [--prompt TOKENS] [--vllm-eager] [--without NAME]`.
vLLM, llama.cpp and OpenVINO GenAI live in environments of their own (`make peers-setup`, or the pythons that PDSERVE_VLLM_PYTHON,
PDSERVE_LLAMA_PYTHON and PDSERVE_OPENVINO_PYTHON name); the run goes on without those that are not there. transformers is in ours.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.bound_cores import add_cores, require_bound
from benchmarks.command import add_threads, benchmark_parser, mode_of, publish
from benchmarks.engine_driver import Dtype
from benchmarks.floors import GemmFloor, MemoryFloor, bare_linear, has_prepacking, prepacked_linear
from benchmarks.llama_peer import llama_program
from benchmarks.openvino_peer import openvino_program
from benchmarks.our_engine import PREFILL_CHUNK, OurEngine
from benchmarks.peer_process import PeerProcess, PeerProgram, Setting, has_module, peer_python
from benchmarks.random_model import DESCRIPTION, LLAMA_100M, write_random_llama
from benchmarks.report import Better, Measurement, Mode, Result, compare, result
from benchmarks.rounds import DECODE_CONTEXT, Effort, decode_ms, prefill_rates, random_prompt
from benchmarks.transformers_peer import TransformersPeer
from benchmarks.vllm_peer import VllmOptions, vllm_program
from service_kit.start_up_objects import set_apart

BATCHES = (1, 8, 32, 128)
PROMPTS = (512, 2048, 8192)
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
EFFORTS: dict[Mode, Effort] = {"quick": Effort(3, 4, 2, 1.0, 10.0), "full": Effort(10, 8, 5, 2.0, 45.0)}
CHECKED_PROMPT, CHECKED_OUTPUT = 200, 24  # tokens, of the comparison of what the engines say
MAX_TOKENS = max(PROMPTS) + 1
PEER_MODULES = {"vllm": "vllm", "llama": "llama_cpp", "openvino": "openvino_genai"}  # what each environment must have
NOTES = (
    "ratio: of us to the one named, above 1 = we are better; of a floor it is the share of the floor's speed that we reach",
    "pdserve: whole engine step, scheduling and sampling included; transformers: forward pass and argmax, unchunked",
    "vLLM, OpenVINO GenAI: whole engine step in one process, prefix caching off; OpenVINO: nothing quantised, KV cache neither;"
    " where the CPU has no bf16 units it computes in float32 whatever is asked for (settings: computes)",
    "llama.cpp: llama_decode over a batch and numpy's argmax, one cache stream per sequence, cache of the weights' type",
    "all: one thread bound to each of the same cores",
    "GEMM floors: torch's linears of one step alone, in that dtype; above 1 where another form of product beats them, as in a bf16"
    " that the CPU only emulates; memory floor: reading the bytes of weights and KV once",
)


@dataclass(frozen=True, slots=True)
class Plan:
    mode: Mode
    cores: tuple[int, ...]  # one compute thread on each
    peers: Mapping[str, Path]  # the pythons of those that are installed
    vllm_eager: bool
    prompts: tuple[int, ...] = PROMPTS  # lengths to prefill

    def program(self, name: str, model_dir: Path, dtype: Dtype) -> PeerProgram:
        python = self.peers[name]
        match name:
            case "vllm":
                options = VllmOptions(dtype, self.cores, MAX_TOKENS, max(BATCHES), self.vllm_eager)
                return vllm_program(python, model_dir, options)
            case "llama":
                return llama_program(python, model_dir, dtype, self.cores, MAX_TOKENS + CHECKED_OUTPUT)
            case "openvino":
                return openvino_program(python, model_dir, dtype, self.cores)
            case _:
                raise ValueError(f"unknown peer: {name}")


class Contenders:
    """All that is measured with one dtype. The first is ours; the last decode floor has no prefill."""

    def __init__(self, plan: Plan, dtype: Dtype, folder: Path, stack: ExitStack) -> None:
        model_dir = write_random_llama(folder / "model")
        torch_dtype: torch.dtype = getattr(torch, dtype)
        self.ours = OurEngine(model_dir, dtype, len(plan.cores))
        stack.callback(self.ours.close)
        torch.set_num_threads(len(plan.cores))
        self.transformers = TransformersPeer(model_dir, torch_dtype)
        self.peers: dict[str, PeerProcess] = {}
        for name in plan.peers:
            peer = self.peers[name] = PeerProcess(plan.program(name, model_dir, dtype), folder / f"{name}.log")
            stack.callback(peer.close)
        self._gemms = [GemmFloor("GEMM floor, F.linear", bare_linear, LLAMA_100M, torch_dtype)]
        if has_prepacking():
            self._gemms.append(GemmFloor("GEMM floor, prepacked", prepacked_linear, LLAMA_100M, torch_dtype))
        self._memory = MemoryFloor(LLAMA_100M, torch_dtype)
        set_apart()  # as a worker does once it is ready
        stack.callback(gc.unfreeze)  # the next dtype has its own

    @property
    def prefilling(self) -> list[OurEngine | TransformersPeer | PeerProcess | GemmFloor]:
        return [self.ours, *self.peers.values(), self.transformers, *self._gemms]

    @property
    def decoding(self) -> list[OurEngine | TransformersPeer | PeerProcess | GemmFloor | MemoryFloor]:
        return [*self.prefilling, self._memory]

    def agreement(self) -> dict[str, Setting]:
        """How many leading tokens of a greedy answer each peer has in common with ours."""
        prompt = random_prompt(random.Random(7), CHECKED_PROMPT)
        ours = self.ours.greedy_tokens(prompt, CHECKED_OUTPUT)
        peers: list[PeerProcess | TransformersPeer] = [*self.peers.values(), self.transformers]
        return {peer.name: common_prefix(ours, peer.greedy_tokens(prompt, CHECKED_OUTPUT)) for peer in peers}


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    for index, (one, other) in enumerate(zip(left, right, strict=True)):
        if one != other:
            return index
    return len(left)


def rows(case: str, unit: str, names: Sequence[str], samples: Sequence[Sequence[float]]) -> Iterator[Measurement]:
    """One measurement per peer of the first; printed as they come, since a whole run takes long."""
    better: Better = "lower" if unit == "ms" else "higher"
    for name, taken in zip(names[1:], samples[1:], strict=True):
        found = compare(f"{case} / {name}", unit, samples[0], (name, taken), better)
        assert found.peer is not None
        ours, theirs = found.figure.median, found.peer.figure.median
        print(f"{found.name}: {ours:.4g} {unit} to {theirs:.4g}, ratio {found.peer.ratio:.2f}", flush=True)
        yield found


def measure_dtype(plan: Plan, dtype: Dtype, settings: dict[str, Setting]) -> list[Measurement]:
    """Adds to `settings` what is particular to this dtype."""
    effort = EFFORTS[plan.mode]
    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder, ExitStack() as stack:
        contenders = Contenders(plan, dtype, Path(folder), stack)
        for peer, running in contenders.peers.items():
            settings |= {f"{dtype}: {peer} {name}": value for name, value in running.settings.items()}
        agreed = contenders.agreement()
        settings |= {f"{dtype}: tokens of {CHECKED_OUTPUT} as {name}": value for name, value in agreed.items()}
        names = [contender.name for contender in contenders.decoding]
        for batch in BATCHES:
            taken = decode_ms(contenders.decoding, batch, effort)
            measurements += rows(f"{dtype}: decode step, batch {batch}", "ms", names, taken)
        names = [contender.name for contender in contenders.prefilling]
        for tokens in plan.prompts:
            taken = prefill_rates(contenders.prefilling, tokens, effort)
            measurements += rows(f"{dtype}: prefill, {tokens} tokens", "tok/s", names, taken)
    return measurements


def run(plan: Plan, dtypes: Sequence[Dtype]) -> Result:
    settings: dict[str, Setting] = {
        "model": DESCRIPTION,
        "threads": len(plan.cores),
        "decode_context": DECODE_CONTEXT,
        "pdserve prefill_chunk": PREFILL_CHUNK,
    }
    measurements = [item for dtype in dtypes for item in measure_dtype(plan, dtype, settings)]
    notes = (*NOTES, *(absence(name) for name in PEER_MODULES if name not in plan.peers))
    os.sched_setaffinity(0, plan.cores)  # this thread was bound to one; the machine's description counts them
    name = "peers" if len(dtypes) > 1 else f"peers_{dtypes[0]}"
    return result(name, plan.mode, settings, measurements, notes=notes)


def absence(name: str) -> str:
    return f"{name} did not take part: left out, or not installed (make peers-setup)"


def main(arguments: list[str] | None = None) -> None:
    parser = benchmark_parser("Engine against others, beside the floors.")
    add_threads(parser)
    add_cores(parser)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be given twice; default: both")
    parser.add_argument("--vllm-eager", action="store_true", help="vLLM without torch.compile: starts sooner")
    parser.add_argument(
        "--without", choices=PEER_MODULES, action="append", default=[], help="leave out a peer; repeatable"
    )
    parser.add_argument(
        "--prompt", type=int, choices=PROMPTS, action="append", help="prefill only this many tokens; repeatable"
    )
    given = parser.parse_args(arguments)
    require_bound(parser, given, "benchmarks.peers", sys.argv[1:] if arguments is None else arguments)
    peers = {
        name: peer_python(name)
        for name, module in PEER_MODULES.items()
        if name not in given.without and has_module(peer_python(name), module)
    }
    for name in PEER_MODULES.keys() - peers.keys():
        print(absence(name), flush=True)
    plan = Plan(mode_of(given), tuple(given.cores), peers, given.vllm_eager, tuple(given.prompt or PROMPTS))
    publish(run(plan, given.dtype or DTYPES))


if __name__ == "__main__":
    main()
