"""Owns the streams of an engine that computes prompts beside the decodes on CUDA, and whether it does. Never run on a GPU so far."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.cuda_export import Event
from engine.flight import Lane
from engine.loaded_model import LoadedModel
from pdserve.errors import ConfigInvalid
from service_kit.config import EngineConfig
from service_kit.logs import get_logger

_log = get_logger(__name__)
_BEFORE_PROMPTS = -1  # priority of a stream; that of prompts is 0, the lowest


class CudaPromptLane:
    """Implements engine.flight.Lane with a stream for prompts. The decodes' stream, current in this thread until `close`, comes
    first where both want a multiprocessor.

    No tensor crosses from one stream to the other: what a flight allocates is made, read and freed on its stream, and pool and
    weights stay allocated. So the allocator need not be told of uses on other streams.
    """

    def __init__(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)  # weights and pool were written on the stream before
        self._before = torch.cuda.current_stream(device)
        torch.cuda.set_stream(torch.cuda.Stream(device, priority=_BEFORE_PROMPTS))  # type: ignore[no-untyped-call]
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def launch(self, work: Callable[[], None]) -> Event:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
            event: Event = self._stream.record_event()
        return event

    def land(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def close(self) -> None:
        torch.cuda.synchronize(self._before.device)
        torch.cuda.set_stream(self._before)


def prompt_lane(model: LoadedModel, engine: EngineConfig) -> Lane | None:
    """None: prompts are computed in one batch with the decodes. Raises ConfigInvalid."""
    if engine.prefill_stream == "shared":
        return None
    if model.device.type != "cuda":
        raise ConfigInvalid(
            f"engine.prefill_stream is own, but the model computes on {model.device.type}, which has no streams. "
            "Set engine.prefill_stream to shared."
        )
    if model.spec.experts is not None:
        _log.info("prefill_stream_shared", reason="experts wait for the device in every layer")
        return None
    _prepare(model)
    return CudaPromptLane(model.device)


def _prepare(model: LoadedModel) -> None:
    """The rotary table at its full size: one that grows is freed while the other stream may read it."""
    first = torch.zeros(1, dtype=torch.int64, device=model.device)
    model.decoder.rotary(first, model.max_context_tokens - 1)
