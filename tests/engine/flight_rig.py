"""Owns how the tests drive an engine with a lane for prompts: over a pool that is not the arena, with a peer that reads at once."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch

from engine.kv_memory import Arena, DeviceKvMemory
from engine.loaded_model import LoadedModel, load_model
from engine.native import NativeEngine
from engine.protocol import (
    Dispatch,
    Event,
    KvReady,
    Started,
)
from service_kit.config import EngineConfig, ModelConfig
from tests.engine.lanes import PollLane, When
from tests.engine.rig import MIB, Recorder
from tests.engine.test_kv_memory import SlowLane

CPU = torch.device("cpu")


def small_model(model_dir: Path) -> LoadedModel:
    config = ModelConfig(path=str(model_dir), device="cpu", dtype="float32")
    loaded, memory = load_model(config, EngineConfig(kv_bytes=4 * MIB, threads=1))
    memory.close()
    return loaded


class Reader(Recorder):
    """Reads announced blocks at once, as a peer does."""

    def __init__(self, arena: torch.Tensor) -> None:
        super().__init__()
        self.read: dict[tuple[Dispatch, int], list[torch.Tensor]] = defaultdict(list)  # by dispatch and layer
        self._arena = arena

    def emit(self, event: Event) -> None:
        super().emit(event)
        if isinstance(event, KvReady):
            table = self.of(Started, event.dispatch.request_key)[0].blocks
            blocks = list(table[event.first_block : event.first_block + event.block_count])
            self.read[event.dispatch, event.layer].append(self._arena[event.layer, blocks].clone())


@dataclass(slots=True)
class Bench:
    """An engine whose pool is not its arena, as on a device."""

    engine: NativeEngine
    told: Reader
    arena: torch.Tensor
    publications: SlowLane
    lane: PollLane | None


def bench(model: LoadedModel, lane: PollLane | None, *, blocks: int = 400, **settings: int | bool) -> Bench:
    model = replace(model, layout=msgspec.structs.replace(model.layout, blocks=blocks))
    arena = Arena(model.layout)
    told = Reader(arena.tensor)
    publications = SlowLane()
    memory = DeviceKvMemory(arena, CPU, publications, SlowLane())
    config = EngineConfig.model_validate({"threads": 1, **settings})
    return Bench(NativeEngine(model, memory, config, told, lane), told, arena.tensor, publications, lane)


def poll_lane(seed: int, when: When = "end", most_polls: int = 6) -> PollLane:
    return PollLane(random.Random(seed), when, most_polls)


def audited(engine: NativeEngine) -> int:
    engine._audit_due_s = 0.0
    return engine.load().blocks_leaked
