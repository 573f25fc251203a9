"""Owns the check and the measure of prompts computed on a stream of their own, beside the decodes (`engine.prefill_stream`)."""

from __future__ import annotations

import itertools
import mmap
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from benchmarks.cuda_checks import (
    CHECKED,
    CHECKED_OUTPUT,
    CHECKED_PROMPTS,
    KV_BYTES,
    TOLERANCES,
    Checked,
    beyond,
    deviation,
)
from benchmarks.engine_driver import Device, Dtype, EngineDriver, LaneOf, TokenSink, greedy
from benchmarks.random_model import LlamaShape, write_random_llama
from benchmarks.reference_llama import ReferenceLlama
from benchmarks.report import Measurement, measure
from engine.cuda_export import Event as LaneEvent
from engine.cuda_streams import prompt_lane
from engine.flight import Lane
from engine.forward import ForwardPass
from engine.kv_memory import TORCH_DTYPES
from engine.loaded_model import LoadedModel
from engine.protocol import Event, KvReady, Started
from engine.step_batch import StepBatch
from service_kit.config import EngineConfig, ModelConfig

Stream = Literal["shared", "own"]
STREAMS: dict[Device, tuple[Stream, ...]] = {"cuda": ("shared", "own"), "cpu": ("shared",)}
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
WARM_UP_STEPS = 10
LOOKS = 3  # of a rehearsal, until a prompt counts as computed
BUSY_SIDE = {"cuda": 4096, "cpu": 64}
LONG_OUTPUT = 8000  # of the decode that prompts are computed beside, which is cancelled before


@dataclass(frozen=True, slots=True)
class Beside:
    """decodes: sequences of `context` tokens. prompts: how many of `prompt` tokens arrive, one after the other. chunks: values of
    engine.prefill_chunk."""

    model: LlamaShape
    kv_bytes: int
    decodes: int
    context: int
    prompts: int
    prompt: int
    chunks: tuple[int, ...]


# Six layers as wide as those of a model of 8 G parameters: launching them takes as long as there, computing them too.
WIDE = LlamaShape(layers=6, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=11_008, vocab=8192)


def device_lane(model: LoadedModel, engine: EngineConfig) -> Lane | None:
    """The device's own, or where it has none that of a rehearsal."""
    return prompt_lane(model, engine) if model.device.type == "cuda" else RehearsalLane()


class RehearsalLane:
    """An engine.flight.Lane for a device without streams: done at once, told after some looks."""

    def launch(self, work: Callable[[], None]) -> LaneEvent:
        work()
        return _Looked()

    def land(self, work: Callable[[], None]) -> None:
        work()

    def close(self) -> None:
        pass


class LateForward:
    """A ForwardPass that ends long after its launch: products come behind the keys and values of its first layer. Not before it:
    the batch is copied to the device first, which the host waits for."""

    def __init__(self, forward: ForwardPass, device: torch.device) -> None:
        side = BUSY_SIDE[device.type]
        self._forward = forward
        self._busy = torch.full((side, side), 0.5 / side, device=device)

    def run(self, batch: StepBatch, layer_written: Callable[[int], None]) -> torch.Tensor:
        return self._forward.run(batch, partial(self._written, layer_written))

    def _written(self, layer_written: Callable[[int], None], layer: int) -> None:
        layer_written(layer)
        if layer == 0:
            for _ in range(20):
                self._busy @ self._busy


class _Looked:
    def __init__(self) -> None:
        self._looks = 0

    def query(self) -> bool:
        self._looks += 1
        return self._looks >= LOOKS

    def synchronize(self) -> None:
        pass


class AnnouncedKv(TokenSink):
    """Also reads announced blocks from the arena, at once."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = torch.empty(0)
        self.tables: dict[int, tuple[int, ...]] = {}
        self.read: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)  # by request key and layer

    def emit(self, event: Event) -> None:
        super().emit(event)
        if isinstance(event, Started):
            self.tables[event.dispatch.request_key] = event.blocks
        if isinstance(event, KvReady):
            key = event.dispatch.request_key
            blocks = self.tables[key][event.first_block : event.first_block + event.block_count]
            self.read[key, event.layer].append(self.arena[event.layer, list(blocks)].clone())


# ---- check


def check_beside(device: Device, dtype: Dtype, threads: int, lane_of: LaneOf = device_lane) -> Checked:
    """Prompts arrive one by one among decodes; one of them is for a hand-off. Against float64, and announced KV against the pool."""
    source = random.Random(5)
    prompts = [[source.randrange(10, CHECKED.vocab) for _ in range(tokens)] for tokens in CHECKED_PROMPTS]
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        model_dir = write_random_llama(Path(folder), CHECKED)
        model = ModelConfig(path=str(model_dir), device=device, dtype=dtype)
        engine = EngineConfig(
            threads=threads, kv_bytes=KV_BYTES, prefix_reuse=False, prefill_chunk=128, prefill_stream="own"
        )
        sink = AnnouncedKv()
        driver = EngineDriver.configured(model, engine, sink, lane_of)
        sink.arena = _arena(driver)
        late = LateForward(driver.engine._aloft, torch.device(device))
        driver.engine._aloft = late  # type: ignore[assignment]
        asked = greedy(CHECKED_OUTPUT, logprobs=1)
        decoding = driver.submit(prompts[2], greedy(LONG_OUTPUT, logprobs=1))
        list(_stepped_beside(driver, decoding))
        handed_over = driver.submit(prompts[-1], asked, "prefill")
        keys, flown_steps = list[int](), 0
        for prompt in prompts:
            keys.append(driver.submit(prompt, asked))
            flown_steps += sum(_stepped_beside(driver, keys[-1]))
        driver.cancel([decoding])
        reference = ReferenceLlama(model_dir, CHECKED)
        pairs = zip([*prompts, prompts[2]], [*keys, decoding], strict=True)
        found = [deviation(reference, prompt, driver, key) for prompt, key in pairs]
        failures = list(_announced(driver, sink, handed_over))
        driver.close()
    name = f"{dtype}, prompts beside decodes"
    measurements = (
        measure(f"{name}: |logprob - float64|", "nat", [item.drawn for item in found]),
        measure(f"{name}: regret of the drawn token", "nat", [item.regret for item in found]),
    )
    if not flown_steps:
        failures.append(f"{name}: no decode was computed while a prompt was in the air")
    return Checked(measurements, (*beyond(measurements, TOLERANCES[dtype]), *failures))


def _stepped_beside(driver: EngineDriver, key: int) -> Iterator[bool]:
    """Steps until the first token of `key`; whether a prompt stayed in the air all through a step."""
    flights = driver.engine._flights
    while key not in driver.sink.token_ids:
        flight = flights._flight
        driver.engine.step()
        yield flight is not None and flights._flight is flight


def _announced(driver: EngineDriver, sink: AnnouncedKv, key: int) -> Iterator[str]:
    pool = driver.engine._memory.pool[:, list(sink.tables[key])].cpu()
    for layer in range(len(pool)):
        parts = sink.read[key, layer]
        if not parts or not torch.equal(torch.cat(parts), pool[layer]):
            yield f"KV of a prompt in the air: layer {layer} was announced before it was in the arena, or not whole"


def _arena(driver: EngineDriver) -> torch.Tensor:
    """As the io process sees it."""
    layout = driver.engine.ready().layout
    size_bytes = layout.layers * layout.blocks * layout.block_bytes
    mapped = mmap.mmap(driver.engine.arena_fd, size_bytes)
    shape = (layout.layers, layout.blocks, 2, layout.page_tokens, layout.kv_heads, layout.head_dim)
    return torch.frombuffer(mapped, dtype=TORCH_DTYPES[layout.dtype]).view(shape)


# ---- measure


def beside(device: Device, sizes: Beside, threads: int) -> list[Measurement]:
    """Milliseconds between the tokens of decodes, alone and while prompts arrive; seconds to the first token of these prompts."""
    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        model_dir = write_random_llama(Path(folder), sizes.model)
        model = ModelConfig(path=str(model_dir), device=device, dtype="bfloat16" if device == "cuda" else "float32")
        for chunk, stream in itertools.product(sizes.chunks, STREAMS[device]):
            engine = EngineConfig(
                threads=threads, kv_bytes=sizes.kv_bytes, prefix_reuse=False, prefill_chunk=chunk,
                token_budget=chunk + sizes.decodes, prefill_stream=stream,
            )  # fmt: skip
            driver = EngineDriver.configured(model, engine)
            measurements += _paces(driver, sizes, f"chunks of {chunk}, {stream} stream")
            driver.close()
    return measurements


def _paces(driver: EngineDriver, sizes: Beside, name: str) -> list[Measurement]:
    source = random.Random(6)

    def prompt(tokens: int) -> list[int]:
        return [source.randrange(10, sizes.model.vocab) for _ in range(tokens)]

    longest = sizes.model.context_tokens - sizes.context - 1
    keys = driver.begin_decode([prompt(sizes.context) for _ in range(sizes.decodes)], longest)
    driver.prefill_beside(prompt(sizes.prompt), keys[0])  # its kernels, and memory for them
    alone = [driver.step_s() * 1e3 for _ in range(WARM_UP_STEPS + 10 * sizes.prompts)][WARM_UP_STEPS:]
    gaps: list[float] = []
    first_tokens: list[float] = []
    for _ in range(sizes.prompts):
        start_s = time.perf_counter()
        gaps += (gap * 1e3 for gap in driver.prefill_beside(prompt(sizes.prompt), keys[0]))
        first_tokens.append((time.perf_counter() - start_s) * 1e3)
    driver.cancel(keys)
    last = statistics.quantiles(gaps, n=100)[98]
    return [
        measure(f"{name}: between tokens of {sizes.decodes} decodes, alone", "ms", alone),
        measure(f"{name}: between tokens while prompts of {sizes.prompt} arrive", "ms", gaps),
        measure(f"{name}: 99 % of these are below", "ms", [last]),
        measure(f"{name}: to the first token of these prompts", "ms", first_tokens),
    ]
