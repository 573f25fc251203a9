"""Owns the checks of the native engine on CUDA: whole runs against a float64 reference, and what is announced of its KV."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from benchmarks.engine_driver import Device, Dtype, EngineDriver, greedy
from benchmarks.random_model import LlamaShape, write_random_llama
from benchmarks.reference_llama import ReferenceLlama
from benchmarks.report import Measurement, measure
from engine.cuda_varlen import VarlenAttention
from engine.kv_memory import Arena, kv_memory_over
from engine.protocol import Layout
from service_kit.config import EngineConfig, ModelConfig

CHECKED = LlamaShape(layers=4, hidden=256, heads=8, kv_heads=2, head_dim=64, intermediate=512, vocab=2000)
CHECKED_PROMPTS = (1, 15, 16, 17, 130, 600)
CHECKED_OUTPUT = 24
KV_BYTES = 64 * 2**20
TOLERANCES: dict[Dtype, float] = {"float32": 1e-3, "bfloat16": 0.15}  # of a log-probability
EXPORT = Layout(layers=4, blocks=64, page_tokens=16, kv_heads=4, head_dim=64, dtype="float32", block_bytes=32_768)

Attention = Literal["auto", "torch"]


@dataclass(frozen=True, slots=True)
class Variant:
    """One way for the engine to compute. attention: engine.kernels; graphs: engine.cuda_graphs."""

    dtype: Dtype
    attention: Attention
    graphs: bool

    @property
    def name(self) -> str:
        attention = "varlen" if self.attention == "auto" else "torch attention"
        return f"{self.dtype}, {attention}, graphs {'on' if self.graphs else 'off'}"

    def open(
        self, model_dir: Path, device: Device, threads: int, kv_bytes: int, *, reuse: bool = False
    ) -> EngineDriver:
        return EngineDriver.configured(
            ModelConfig(path=str(model_dir), device=device, dtype=self.dtype),
            EngineConfig(
                threads=threads, kv_bytes=kv_bytes, prefix_reuse=reuse, kernels=self.attention, cuda_graphs=self.graphs
            ),
        )


# Varlen attention does not compute in float32: there the two attentions are one.
VARIANTS = (
    Variant("float32", "torch", graphs=False),
    Variant("float32", "torch", graphs=True),
    Variant("bfloat16", "torch", graphs=False),
    Variant("bfloat16", "torch", graphs=True),
    Variant("bfloat16", "auto", graphs=False),
    Variant("bfloat16", "auto", graphs=True),
)


@dataclass(frozen=True, slots=True)
class Checked:
    measurements: tuple[Measurement, ...]
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Deviation:
    """Largest differences over all positions, of the engine from the reference. Natural log."""

    drawn: float  # log-probability of the token drawn
    regret: float  # how much more likely the reference's best token is than the one drawn


def deviation(reference: ReferenceLlama, prompt: Sequence[int], driver: EngineDriver, key: int) -> Deviation:
    """Compares the greedy output under `key` with the reference run over prompt + output."""
    output, rows = driver.sink.token_ids[key], driver.sink.logprobs[key]
    expected = reference.log_probabilities([*prompt, *output])[len(prompt) - 1 : -1]
    drawn = expected.gather(1, torch.tensor(output)[:, None])[:, 0]
    given = torch.tensor([row.logprobs[0] for row in rows], dtype=drawn.dtype)
    return Deviation((drawn - given).abs().max().item(), (expected.max(1).values - drawn).max().item())


def check_engine(device: Device, variant: Variant, threads: int) -> Checked:
    """All prompts in one batch: chunks, page borders and mixed steps are then all taken; then steps that only decode."""
    source = random.Random(3)
    prompts = [[source.randrange(10, CHECKED.vocab) for _ in range(tokens)] for tokens in CHECKED_PROMPTS]
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        model_dir = write_random_llama(Path(folder), CHECKED)
        driver = variant.open(model_dir, device, threads, KV_BYTES)
        keys = [driver.submit(prompt, greedy(CHECKED_OUTPUT, logprobs=1)) for prompt in prompts]
        driver.finish()
        reference = ReferenceLlama(model_dir, CHECKED)
        found = [deviation(reference, prompt, driver, key) for prompt, key in zip(prompts, keys, strict=True)]
        failures = list(not_taken(driver, variant)) if device == "cuda" else []
        driver.close()
    measurements = (
        measure(f"{variant.name}: |logprob - float64|", "nat", [item.drawn for item in found]),
        measure(f"{variant.name}: regret of the drawn token", "nat", [item.regret for item in found]),
    )
    return Checked(measurements, (*beyond(measurements, TOLERANCES[variant.dtype]), *failures))


def beyond(checks: Sequence[Measurement], tolerance: float) -> list[str]:
    return [f"{item.name} is {item.figure.high:.3g}" for item in checks if not item.figure.high <= tolerance]


def not_taken(driver: EngineDriver, variant: Variant) -> Iterator[str]:
    """The engine falls back where something does not work on its device. A check of the fallback would check nothing new."""
    forward = driver.engine._forward
    if variant.attention == "auto" and not isinstance(forward._attention, VarlenAttention):
        yield f"{variant.name}: fell back to torch's operators, see cuda_attention in the log"
    if variant.graphs and (forward._graphs is None or not forward._graphs.recorded):
        yield f"{variant.name}: no graphs were recorded, see cuda_graphs in the log"


class Watcher:
    """Looks at the arena at every announcement of an export."""

    def __init__(self, arena: torch.Tensor, contents: torch.Tensor, blocks: list[int]) -> None:
        self.layers: list[int] = []
        self.early: list[int] = []
        self._arena = arena
        self._contents = contents
        self._blocks = blocks

    def look(self, layer: int) -> None:
        self.layers.append(layer)
        if not torch.equal(self._arena[layer, self._blocks], self._contents[layer, self._blocks]):
            self.early.append(layer)


def check_exports(device: Device) -> Checked:
    """Every layer is published while the device still computes it, and the arena is looked at when it is announced."""
    place, arena = torch.device(device), Arena(EXPORT)
    memory = kv_memory_over(arena, place)
    pinned = memory.pinned_bytes
    contents = torch.randn(memory.pool.shape, generator=torch.Generator().manual_seed(6))
    blocks = [block for block in range(EXPORT.blocks) if block % 5]
    watcher, failures = Watcher(arena.tensor, contents, blocks), [*_unpinned(arena, pinned, place)]
    for layer in range(EXPORT.layers):
        memory.pool[layer].copy_(_late(contents[layer], place))
        memory.publish(layer, blocks, partial(watcher.look, layer))
    memory.settle()
    if watcher.early:
        failures.append(f"KV export: layers {watcher.early} were announced before they were in the arena")
    if watcher.layers != list(range(EXPORT.layers)):
        failures.append(f"KV export: layers were announced in the order {watcher.layers}")
    memory.pool.zero_()
    arena.tensor.copy_(contents)
    memory.absorb(blocks)
    if not torch.equal(memory.pool.cpu()[:, blocks], contents[:, blocks]):
        failures.append("KV import: the pool differs from what was received")
    memory.close()
    if pinned and arena.tensor.is_pinned():
        failures.append("KV arena: it is still registered with the driver after its memory was closed")
    return Checked((), tuple(failures))


def _unpinned(arena: Arena, pinned_bytes: int, device: torch.device) -> Iterator[str]:
    """Asks the driver beside what the memory says of itself."""
    if device.type != "cuda":
        return
    if pinned_bytes != arena.tensor.nbytes:
        yield f"KV arena: {pinned_bytes} of {arena.tensor.nbytes} bytes are registered, see arena_not_pinned in the log"
    if not arena.tensor.is_pinned():
        yield "KV arena: the driver does not know its memory as pinned"


def _late(content: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same on the device, after products that take long enough for a copy that does not wait to come too early."""
    side = 4096 if device.type == "cuda" else 64
    busy = torch.full((side, side), 0.5 / side, device=device)
    for _ in range(20):
        busy = busy @ busy
    return content.to(device) + 0.0 * busy[0, 0]
